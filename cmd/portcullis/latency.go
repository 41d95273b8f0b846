package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"portcullis/filter"
)

// collectLatency sums the workers' histograms.
func collectLatency(ch chan<- prometheus.Metric, queues []filter.QueueStats) {
	var sum time.Duration
	fixed, exponential := make([]uint64, len(filter.LatencyBounds())), []uint64(nil)
	for _, q := range queues {
		sum += q.LatencySum
		for i := range fixed {
			fixed[i] += q.Latency[i]
		}
		if exponential == nil {
			exponential = make([]uint64, len(q.LatencyExponential))
		}
		for i, n := range q.LatencyExponential {
			exponential[i] += n
		}
	}
	ch <- twofold(latency.desc, sum, fixed, exponential)
}

// twofold makes a histogram with buckets of both of Prometheus' kinds: classic
// ones, which every Prometheus reads, and native ones, which are finer and which
// one reads that is told to. Both count the same, but workers go on meanwhile:
// what the native ones have counts.
func twofold(desc *prometheus.Desc, sum time.Duration, fixed, exponential []uint64) prometheus.Metric {
	var count, below uint64
	native := map[int]int64{}
	for i, n := range exponential {
		count += n
		if i > 0 && n > 0 {
			native[filter.ExponentialFirst+i] = int64(n)
		}
	}
	var first uint64
	if len(exponential) > 0 {
		first = exponential[0]
	}
	classic := map[float64]uint64{}
	for i, bound := range filter.LatencyBounds() {
		below += fixed[i]
		classic[bound.Seconds()] = min(below, count)
	}
	// What is below the first bucket's end counts as zero.
	const zero = 1.0 / (1 << (-filter.ExponentialFirst >> filter.ExponentialSchema))
	n, err := prometheus.NewConstNativeHistogram(desc, count, sum.Seconds(), native, nil, first, filter.ExponentialSchema, zero, time.Time{})
	if err != nil {
		return prometheus.NewInvalidMetric(desc, err)
	}
	return bothKinds{prometheus.MustNewConstHistogram(desc, count, sum.Seconds(), classic), n}
}

// bothKinds joins two histograms of the same values to one.
type bothKinds struct{ classic, native prometheus.Metric }

// Desc implements prometheus.Metric.
func (b bothKinds) Desc() *prometheus.Desc { return b.classic.Desc() }

// Write implements prometheus.Metric.
func (b bothKinds) Write(out *dto.Metric) error {
	var classic dto.Metric
	if err := b.classic.Write(&classic); err != nil {
		return err
	}
	if err := b.native.Write(out); err != nil {
		return err
	}
	out.Histogram.Bucket, out.Histogram.CreatedTimestamp = classic.Histogram.Bucket, nil
	return nil
}
