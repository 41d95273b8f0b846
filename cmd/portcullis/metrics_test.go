package main

import (
	"math"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"portcullis/filter"
)

// TestMetricsAreThoseOfREADME holds the table in README and the program's metrics
// to each other: names, types and labels, both ways.
func TestMetricsAreThoseOfREADME(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(portcullis_\\w+)` \\| (\\w+) \\| (.*?) \\| .+ \\|$").FindAllStringSubmatch(string(readme), -1) {
		if told[row[1]] != "" {
			t.Errorf("README.md has %s twice", row[1])
		}
		told[row[1]] = row[2] + " " + row[3]
	}
	for _, f := range families {
		var labels []string
		for _, l := range f.labels {
			labels = append(labels, "`"+l+"`")
		}
		want := f.kind + " " + strings.Join(labels, ", ")
		if got := told[f.name]; got != want {
			t.Errorf("%s is %q, and in README.md %q", f.name, want, got)
		}
		delete(told, f.name)
		if f.help == "" || strings.HasSuffix(f.name, "_total") != (f.kind == "counter") {
			t.Errorf("%s is a %s, %q", f.name, f.kind, f.help)
		}
	}
	for name := range told {
		t.Errorf("README.md has %s, which isn't there", name)
	}
	if len(families) < 30 {
		t.Errorf("only %d metrics", len(families))
	}
}

// TestTwofoldHistogram: both kinds of buckets have each value, in the right place.
func TestTwofoldHistogram(t *testing.T) {
	fixed := make([]uint64, len(filter.LatencyBounds()))
	fixed[2] = 3                      // up to 5 µs
	exponential := make([]uint64, 98) // as a worker has them
	exponential[0], exponential[8] = 1, 2
	var m dto.Metric
	if err := twofold(latency.desc, 11*time.Microsecond, fixed, exponential).Write(&m); err != nil {
		t.Fatal(err)
	}
	h := m.Histogram
	if h.GetSampleCount() != 3 || h.GetSampleSum() != 11e-6 || len(h.Bucket) != len(fixed) || h.Bucket[1].GetCumulativeCount() != 0 || h.Bucket[2].GetCumulativeCount() != 3 {
		t.Errorf("classic: %v", h)
	}
	// Bucket -72 ends at 2^-18 seconds, 3.8 µs.
	if h.GetSchema() != filter.ExponentialSchema || h.GetZeroCount() != 1 || h.GetZeroThreshold() != math.Exp2(-20) ||
		len(h.PositiveSpan) != 1 || h.PositiveSpan[0].GetOffset() != -72 || h.PositiveSpan[0].GetLength() != 1 || h.PositiveDelta[0] != 2 {
		t.Errorf("native: %v", h)
	}
	if err := twofold(latency.desc, 0, fixed, nil).Write(&m); err != nil {
		t.Errorf("nothing yet: %v", err)
	}
}
