package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"portcullis/filter"
	"portcullis/verdict"
)

var (
	revoked       = counter("revoked_connections_total", "Open connections that a change of policy has cut.")
	restored      = counter("restored_connections_total", "Revoked connections that a later change allowed again.")
	rejudged      = counter("rejudged_connections_total", "Open connections that were judged anew, each time counted.")
	rejudgeTime   = histogram("rejudge_duration_seconds", "Time of a look at the open connections after a change.")
	rejudgeErrors = counter("rejudge_errors_total", "Looks at the open connections that failed and were tried again.")
)

// newRevoker makes what judges open connections anew. It speaks to conntrack only
// once it runs.
func (a *agent) newRevoker(markBits uint32) *filter.Revoker {
	took := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    rejudgeTime.name,
		Help:    rejudgeTime.help,
		Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),

		NativeHistogramBucketFactor:     1.2,
		NativeHistogramMaxBucketNumber:  100,
		NativeHistogramMinResetDuration: time.Hour,
	})
	a.metrics.registry.MustRegister(took)
	return filter.NewRevoker(filter.RevokeConfig{
		Engine: a.engine, MarkBits: markBits, Settle: a.settle, Ring: a.audit.NewRing(), Log: a.log,
		Observe: func(d time.Duration) { took.Observe(d.Seconds()) },
	})
}

// settle waits until no worker has a packet in hand that it took up before.
func (a *agent) settle() {
	a.mu.Lock()
	queues := a.queues
	a.mu.Unlock()
	if queues != nil {
		queues.Settle()
	}
}

// rejudge has open connections judged by the snapshot that has just come in force:
// those that its changes concern, or all of them if there may have been nobody at
// the gate until now.
func (a *agent) rejudge(s *verdict.Snapshot, all bool) {
	if all {
		a.revoker.Everything()
		return
	}
	a.revoker.Changed(s.Changed())
}

// collectRejudged shows what became of open connections.
func collectRejudged(ch chan<- prometheus.Metric, s filter.RevokeStats) {
	revoked.emit(ch, float64(s.Revoked))
	restored.emit(ch, float64(s.Restored))
	rejudged.emit(ch, float64(s.Judged))
	rejudgeErrors.emit(ch, float64(s.Errors))
}
