package proof

import (
	"fmt"
	"math"
	"slices"
)

// target is a statement that the figures bear out or don't.
type target struct {
	what  string
	bound float64
	least bool      // the bound is the least that will do, else the most
	found []float64 // round by round
}

func (t target) met() bool {
	m := summarize(t.found).median
	if t.least {
		return m >= t.bound
	}
	return m <= t.bound
}

// verdict is "met" or "not met", and "not measured" where there is nothing to say.
func (t target) verdict() string {
	switch {
	case math.IsNaN(summarize(t.found).median):
		return "not measured"
	case t.met():
		return "met"
	}
	return "**not met**"
}

// targets are the issue's, each a ratio of figures of one round.
func (r *Results) targets() []target {
	var all []target
	first, last := r.Params.Policies[0], r.Params.Policies[len(r.Params.Policies)-1]
	for _, e := range []string{agentName(first), missName(first), agentName(last), missName(last)} {
		all = append(all, target{what: fmt.Sprintf("connect p50 over (b): %s ÷ (c)", e), bound: 1.25,
			found: ratios(r.extra(e), r.extra(echoName))})
	}
	e := agentName(first)
	for _, clients := range slices.Compact([]int{1, r.Params.Clients}) {
		for _, pairs := range slices.Compact([]int{1, r.Params.Pairs}) {
			f := floodFigure(clients, pairs)
			all = append(all,
				target{what: fmt.Sprintf("%s: %s ÷ (c)", f, e), bound: 0.9, least: true, found: r.ratio(e, echoName, f)},
				target{what: fmt.Sprintf("%s: %s ÷ (d)", f, e), bound: 1.4, least: true, found: r.ratio(e, callback, f)})
		}
	}
	all = append(all, target{what: fmt.Sprintf("one stream's throughput: %s ÷ (b)", e), bound: 0.98, least: true, found: r.ratio(e, conntrack, streamRate)})
	for _, name := range []func(int) string{agentName, missName} {
		all = append(all, target{what: fmt.Sprintf("flat, connect p50: %s ÷ %s", name(last), name(first)), bound: 1.1,
			found: r.ratio(name(last), name(first), connectP50)})
	}
	return slices.CompactFunc(all, func(a, b target) bool { return a.what == b.what })
}

// extra is what a variant's median connect takes beyond conntrack's, by round.
func (r *Results) extra(variant string) []float64 {
	return differences(valuesOf(r.rounds[variant], connectP50), valuesOf(r.rounds[conntrack], connectP50))
}

// ratio divides two variants' figures, round by round.
func (r *Results) ratio(over, under string, what figure) []float64 {
	return ratios(valuesOf(r.rounds[over], what), valuesOf(r.rounds[under], what))
}
