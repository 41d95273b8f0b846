package main

import (
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

// What --record may say.
const (
	recordQueued = "queued"
	recordAll    = "all"
)

// decisionLogFlags say which decisions are logged, and where.
type decisionLogFlags struct {
	to       []string
	ring     int
	labels   bool
	window   time.Duration
	maxSize  int
	maxFiles int
	compress bool
	audit    string
	sample   int
	rate     int
	record   string
}

func (d *decisionLogFlags) register(f *pflag.FlagSet) {
	f.StringArrayVar(&d.to, "decision-log", nil, "file to append a JSON line per decision to, opened anew on SIGHUP, or - for standard output; give it twice for both")
	f.IntVar(&d.ring, "decision-log-ring", 8192, "how many decisions a queue holds for the log; more are lost, and counted")
	f.BoolVar(&d.labels, "decision-log-labels", false, "add the pods' labels to each record")
	f.DurationVar(&d.window, "decision-log-window", 10*time.Second, "how long repeats of a denied connection are gathered into one record; 0 for not at all")
	f.IntVar(&d.maxSize, "decision-log-max-size", 100, "size in MiB at which the file is rotated; 0 for never")
	f.IntVar(&d.maxFiles, "decision-log-max-files", 5, "how many rotated files are kept; 0 for all")
	f.BoolVar(&d.compress, "decision-log-compress", false, "compress rotated files with gzip")
	f.StringVar(&d.audit, "audit", "all", "which decisions are logged: all, denied or none; a namespace's annotation portcullis.dev/audit goes before it")
	f.IntVar(&d.sample, "audit-sample", 1, "log one in so many allows")
	f.StringVar(&d.record, "record", recordQueued, "queued: the connections that pass the queue, which are those of isolated pods; all: also those of pods that no policy isolates, by conntrack's word")
	f.IntVar(&d.rate, "audit-rate", 0, "how many records a second are written at most; 0 for any number")
}

// check finds what is wrong with the flags.
func (d *decisionLogFlags) check() error {
	files := 0
	for _, to := range d.to {
		if to != "-" {
			files++
		}
	}
	mode, known := verdict.ParseAudit(d.audit)
	switch {
	case files > 1 || len(d.to)-files > 1:
		return fmt.Errorf("--decision-log %q: one file and - for standard output at most", d.to)
	case d.ring < 1:
		return fmt.Errorf("--decision-log-ring %d: at least one place is needed", d.ring)
	case d.window < 0:
		return fmt.Errorf("--decision-log-window %s is below zero", d.window)
	case d.maxSize < 0:
		return fmt.Errorf("--decision-log-max-size %d is below zero", d.maxSize)
	case d.maxFiles < 0:
		return fmt.Errorf("--decision-log-max-files %d is below zero", d.maxFiles)
	case !known || mode == verdict.AuditDefault:
		return fmt.Errorf("--audit %q: want all, denied or none", d.audit)
	case d.sample < 1:
		return fmt.Errorf("--audit-sample %d: one in how many allows?", d.sample)
	case d.record != recordQueued && d.record != recordAll:
		return fmt.Errorf("--record %q: want %s or %s", d.record, recordQueued, recordAll)
	case d.record == recordAll && len(d.to) == 0:
		return fmt.Errorf("--record %s needs a --decision-log to write to", recordAll)
	case d.rate < 0:
		return fmt.Errorf("--audit-rate %d is below zero", d.rate)
	}
	return nil
}

// tapRing is how many decisions a queue holds where there is only the tap to hand them
// to, every few milliseconds.
const tapRing = 1024

// open starts the decision log, nil if none is wanted, nobody can tap it and nobody is
// to be told of denials, and gives its file if it has one.
func (d *decisionLogFlags) open(node string, stdout io.Writer, tap *audit.Tap, denied func(*audit.Record)) (*audit.Log, *audit.File, error) {
	mode, _ := verdict.ParseAudit(d.audit) // check has read it
	cfg := audit.Config{Node: node, Tap: tap, RingSize: d.ring, Labels: d.labels, Window: d.window, Audit: mode, Sample: d.sample, Rate: d.rate, Denied: denied}
	var file *audit.File
	for _, to := range d.to {
		switch to {
		case "":
		case "-":
			cfg.Sinks = append(cfg.Sinks, audit.Sink{Name: "stdout", W: stdout})
		default:
			var err error
			file, err = audit.OpenFile(audit.FileConfig{Path: to, MaxSize: d.maxSize, MaxFiles: d.maxFiles, Compress: d.compress})
			if err != nil {
				return nil, nil, fmt.Errorf("--decision-log: %w", err)
			}
			cfg.Sinks = append(cfg.Sinks, audit.Sink{Name: "file", W: file})
		}
	}
	if len(cfg.Sinks) == 0 {
		cfg.RingSize = min(cfg.RingSize, tapRing) // nobody counts on it being complete
	}
	return audit.NewLog(cfg), file, nil
}

// collectDecisionLog shows what became of the decisions that were to be logged.
func collectDecisionLog(ch chan<- prometheus.Metric, s audit.Stats) {
	if len(s.Sinks) == 0 {
		return
	}
	for _, sink := range s.Sinks {
		logWritten.emit(ch, float64(sink.Written), sink.Name)
		logLost.emit(ch, float64(sink.Lost), sink.Name)
		logErrors.emit(ch, float64(sink.Failures), sink.Name)
	}
	logOmitted.emit(ch, float64(s.Unselected), "unselected")
	logOmitted.emit(ch, float64(s.Sampled), "sampled")
	logOmitted.emit(ch, float64(s.Suppressed), "suppressed")
	logHeld.emit(ch, float64(s.Held))
}

// sayClosed logs the last count of the decision log, a line for each sink.
func sayClosed(log *slog.Logger, s audit.Stats) {
	for _, sink := range s.Sinks {
		log.Info("decision log closed", "sink", sink.Name, "written", sink.Written, "lost", sink.Lost,
			"unselected", s.Unselected, "sampled", s.Sampled, "suppressed", s.Suppressed)
	}
}
