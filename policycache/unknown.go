package policycache

import (
	"maps"
	"net/netip"
	"slices"

	"portcullis/verdict"
)

// Unknown says what is to become of packets of a pod that nobody knows: of an address
// in the node's pod ranges that is neither a pod's nor a node's. The zero value knows
// no such pods.
type Unknown struct {
	// Guard has them looked out for, in the ranges of the Node object and in CIDRs.
	Guard bool
	CIDRs []netip.Prefix
	// Verdict is for those that don't become known in time.
	Verdict verdict.Verdict
}

// SetUnknown says what is to become of unknown pods' packets, from the next compile
// on.
func (c *Compiler) SetUnknown(u Unknown) { c.unknown = u }

// noteRanges finds the node's pod ranges. As long as there is no policy in the
// cluster none could select an unknown pod, so there is nothing to look out for.
func (w *compilation) noteRanges() {
	var now *verdict.PodRanges
	if w.unknown.Guard && len(w.policies) > 0 {
		prefixes := slices.Clone(w.unknown.CIDRs)
		if n := w.nodes[w.node]; n != nil {
			prefixes = append(prefixes, n.PodCIDRs...)
		}
		now = verdict.NewPodRanges(prefixes, w.unknown.Verdict)
	}
	if !now.Equal(w.ranges) {
		w.ranges = now
	}
}

// noteGiven takes in which pods have addresses by the CNI plugins' word. It matters
// where several claim one.
func (w *compilation) noteGiven(given map[netip.Addr]string) {
	if maps.Equal(given, w.claims.given) {
		return
	}
	for a := range w.claims.rivals {
		if given[a] != w.claims.given[a] {
			w.staleAddrs, w.problemsChanged = append(w.staleAddrs, a), true
		}
	}
	w.claims.given = given
}

// word says why the owner of an address with several claims is taken to own it.
func (c *claims) word(a netip.Addr, owner *pod) string {
	if c.given[a] == owner.Key() {
		return "the pod that its CNI plugin has given it to"
	}
	return "the newest running pod"
}
