package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"portcullis/filter/audit"
	"portcullis/policycache/kube"
)

var eventsWritten = counter("events_total", "With --events: Kubernetes events on denied pods, by what became of them: written, refused (the API server didn't take it), suppressed (there were too many).", "result")

// openEvents makes the writer of events, nil if none are wanted.
func (o *agentOptions) openEvents(log *slog.Logger) (*kube.Events, error) {
	if !o.events {
		return nil, nil
	}
	client, err := o.cluster.connect()
	if err != nil {
		return nil, err
	}
	return kube.NewEvents(client, o.node, log), nil
}

// denied hands denials over to the writer, nil if there is none.
func denied(e *kube.Events) func(*audit.Record) {
	if e == nil {
		return nil
	}
	return func(r *audit.Record) { e.Denied(&r.Flow, &r.Decision) }
}

// eventsUntil writes events until ctx ends.
func (a *agent) eventsUntil(ctx context.Context) {
	if a.events != nil {
		a.events.Run(ctx)
	}
}

func (a *agent) describeEvents(w io.Writer) {
	if a.events == nil {
		return
	}
	if err := a.events.Trouble(); err != nil {
		fmt.Fprintf(w, "[!] events: %s\n", oneLine(err))
	}
}

func (a *agent) collectEvents(ch chan<- prometheus.Metric) {
	if a.events == nil {
		return
	}
	s := a.events.Stats()
	eventsWritten.emit(ch, float64(s.Written), "written")
	eventsWritten.emit(ch, float64(s.Refused), "refused")
	eventsWritten.emit(ch, float64(s.Suppressed), "suppressed")
}
