package proof

import (
	"math"
	"slices"
)

// percentile gives the value below which the share p (0 to 1) of the sorted
// values lies, by the nearest-rank method; NaN of no values.
func percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	rank := int(math.Ceil(p*float64(len(sorted)))) - 1
	return sorted[min(max(rank, 0), len(sorted)-1)]
}

// summary is what rounds have found of one figure: the median of the rounds'
// values, and the lowest and highest of them.
type summary struct{ median, low, high float64 }

// summarize leaves out values that are no numbers, such as a round's that failed.
func summarize(values []float64) summary {
	sorted := slices.DeleteFunc(slices.Clone(values), math.IsNaN)
	slices.Sort(sorted)
	if len(sorted) == 0 {
		return summary{math.NaN(), math.NaN(), math.NaN()}
	}
	middle := len(sorted) / 2
	median := sorted[middle]
	if len(sorted)%2 == 0 {
		median = (sorted[middle-1] + sorted[middle]) / 2
	}
	return summary{median, sorted[0], sorted[len(sorted)-1]}
}

// ratios divides two figures round by round.
func ratios(over, under []float64) []float64 {
	out := make([]float64, min(len(over), len(under)))
	for i := range out {
		out[i] = over[i] / under[i]
	}
	return out
}

// differences subtracts two figures round by round.
func differences(from, what []float64) []float64 {
	out := make([]float64, min(len(from), len(what)))
	for i := range out {
		out[i] = from[i] - what[i]
	}
	return out
}

// rotation gives the order in which round measures n variants: every variant is
// first in one of n rounds, and every other round goes backwards, so that nobody
// always follows the same neighbour.
func rotation(n, round int) []int {
	order := make([]int, n)
	for i := range order {
		order[i] = (i + round) % n
	}
	if round%2 == 1 {
		slices.Reverse(order)
	}
	return order
}
