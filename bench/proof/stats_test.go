package proof

import (
	"math"
	"slices"
	"testing"
)

func TestPercentile(t *testing.T) {
	values := make([]float64, 100)
	for i := range values {
		values[i] = float64(i + 1)
	}
	for p, want := range map[float64]float64{0: 1, 0.01: 1, 0.5: 50, 0.99: 99, 0.991: 100, 1: 100} {
		if got := percentile(values, p); got != want {
			t.Errorf("%v: %v, want %v", p, got, want)
		}
	}
	if got := percentile([]float64{7}, 0.5); got != 7 {
		t.Errorf("of one: %v", got)
	}
	if !math.IsNaN(percentile(nil, 0.5)) {
		t.Error("of nothing there is none")
	}
}

func TestSummarize(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   summary
	}{
		{[]float64{3, 1, 2}, summary{2, 1, 3}},
		{[]float64{4, 1}, summary{2.5, 1, 4}},
		{[]float64{math.NaN(), 5}, summary{5, 5, 5}},
	} {
		if got := summarize(c.values); got != c.want {
			t.Errorf("%v: %v, want %v", c.values, got, c.want)
		}
	}
	if !math.IsNaN(summarize(nil).median) {
		t.Error("nothing has a median")
	}
}

func TestRatiosAreMadeByRound(t *testing.T) {
	// The second round is one in which everything took twice as long.
	if got := ratios([]float64{10, 20}, []float64{5, 10}); !slices.Equal(got, []float64{2, 2}) {
		t.Errorf("%v", got)
	}
	if got := differences([]float64{10, 20, 30}, []float64{5, 10}); !slices.Equal(got, []float64{5, 10}) {
		t.Errorf("%v", got)
	}
}

func TestRotation(t *testing.T) {
	first := map[int]bool{}
	for round := range 10 {
		order := rotation(5, round)
		if sorted := slices.Sorted(slices.Values(order)); !slices.Equal(sorted, []int{0, 1, 2, 3, 4}) {
			t.Errorf("round %d leaves somebody out: %v", round, order)
		}
		first[order[0]] = true
	}
	if len(first) < 4 {
		t.Errorf("only %v are ever first", first)
	}
	if slices.Equal(rotation(5, 0), rotation(5, 1)) {
		t.Error("two rounds have the same order")
	}
}
