package main

import (
	"fmt"
	"io"

	"github.com/prometheus/client_golang/prometheus"

	"portcullis/filter"
)

var (
	connsObserved  = counter("observed_connections_total", "With --record all: connections that weren't queued, since no policy isolates their ends here, and were put into the decision log.")
	observedUnseen = counter("observed_unseen_total", "With --record all: new connections that the kernel couldn't tell of, those that were queued included.")
	observedErrors = counter("observed_errors_total", "With --record all: what the kernel told and that made no sense.")
	passedUnjudged = counter("observed_unjudged_total", "With --record all: connections of isolated pods that passed without being queued: nobody listened and the gate fails open, or the policy came later than the packet.")
)

// record sees to it that the connections that aren't queued are recorded, if that
// is wanted. What is in the way is told, and tried again with the next repair: it
// keeps nobody from enforcing.
func (a *agent) record() {
	if a.options.decisions.record != recordAll {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.recordLocked()
	a.note("connections that aren't queued can't be recorded", &a.state.record, err)
}

// recordLocked opens the recorder, once, and looks whether it can still work. The
// caller holds a.mu.
func (a *agent) recordLocked() (err error) {
	if a.recorder != nil {
		return filter.CheckEvents(a.options.sysctlDir)
	}
	a.recorder, err = filter.OpenRecorder(filter.RecorderConfig{AcceptMark: a.queueCfg.AcceptMark, SysctlDir: a.options.sysctlDir}, a.engine, a.audit, a.log)
	return err
}

// describeRecord says how recording is doing. The caller holds a.mu.
func (a *agent) describeRecord(w io.Writer) {
	switch {
	case a.state.record != nil:
		fmt.Fprintf(w, "[!] record: %s\n", oneLine(a.state.record))
	case a.recorder != nil:
		fmt.Fprintf(w, "[i] record: %d connections that weren't queued\n", a.recorder.Stats().Recorded)
	}
}

// collectRecord shows what was recorded, nothing if nothing is to be.
func collectRecord(ch chan<- prometheus.Metric, r *filter.Recorder) {
	if r == nil {
		return
	}
	s := r.Stats()
	connsObserved.emit(ch, float64(s.Recorded))
	observedUnseen.emit(ch, float64(s.Unseen))
	observedErrors.emit(ch, float64(s.Unreadable))
	passedUnjudged.emit(ch, float64(s.Unjudged))
}
