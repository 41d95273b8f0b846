package verdict

import (
	"net/netip"
	"slices"
)

// PodRanges says which addresses are pods' even when nobody knows whose: those of
// the ranges that the node gives its pods addresses from. It is immutable once
// made; snapshots share it.
type PodRanges struct {
	prefixes []netip.Prefix
	spans    []span
	verdict  Verdict
}

// span is a run of addresses, both ends included.
type span struct{ first, last addrKey }

// NewPodRanges makes the ranges of these prefixes, nil if there are none. Whatever
// nobody knows within them gets the verdict, unless the other end is denied anyway.
//
// A range's first address is no pod's, nor is IPv4's last: the network's own and the
// broadcast address (RFC 919), and the anycast address of the subnet's routers (RFC
// 4291, 2.6.1). Ranges of one or two addresses have neither (RFC 3021, RFC 6164).
func NewPodRanges(prefixes []netip.Prefix, v Verdict) *PodRanges {
	r := &PodRanges{verdict: v}
	for _, p := range prefixes {
		if !p.IsValid() || p.Addr().Is4In6() || p.Bits() == 0 {
			continue
		}
		p = p.Masked()
		if slices.Contains(r.prefixes, p) {
			continue
		}
		r.prefixes = append(r.prefixes, p)
		r.spans = append(r.spans, spanOf(p))
	}
	if len(r.spans) == 0 {
		return nil
	}
	return r
}

func spanOf(p netip.Prefix) span {
	s := span{first: keyOf(p.Addr()), last: keyOf(p.Addr())}
	host := p.Addr().BitLen() - p.Bits()
	low, high := min(host, 64), max(host-64, 0)
	s.last.lo |= ones(low)
	s.last.hi |= ones(high)
	if host < 2 {
		return s
	}
	s.first.lo++ // its lower bits are zero
	if p.Addr().Is4() {
		s.last.lo-- // and here they are one
	}
	return s
}

// ones gives a number whose lowest n bits are set.
func ones(n int) uint64 {
	if n >= 64 {
		return ^uint64(0)
	}
	return 1<<n - 1
}

// Prefixes lists the ranges. The slice is not to be changed.
func (r *PodRanges) Prefixes() []netip.Prefix {
	if r == nil {
		return nil
	}
	return r.prefixes
}

// Equal tells whether both say the same.
func (r *PodRanges) Equal(o *PodRanges) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.verdict == o.verdict && slices.Equal(r.prefixes, o.prefixes)
}

// hold tells whether the address is in one of the ranges.
func (r *PodRanges) hold(k *addrKey) bool {
	if r == nil {
		return false
	}
	for i := range r.spans {
		s := &r.spans[i]
		if !k.less(&s.first) && !s.last.less(k) {
			return true
		}
	}
	return false
}

func (k *addrKey) less(o *addrKey) bool { return k.hi < o.hi || k.hi == o.hi && k.lo < o.lo }

// PodRanges gives the ranges in which an address that nobody has is an unknown
// pod's, nil for none.
func (s *Snapshot) PodRanges() *PodRanges { return s.ranges }

// KnownAddrs lists the addresses in the pod ranges that somebody has, sorted: those
// of pods, wherever they are, and of nodes. The slice belongs to the snapshot, as
// that of IsolatedAddrs.
func (s *Snapshot) KnownAddrs() []netip.Addr { return s.list(s.known, s.isKnown) }

// isKnown tells whether the end is somebody's in the pod ranges.
func (s *Snapshot) isKnown(e *end) bool { return e.used && s.ranges.hold(&e.addrKey) }

// Unknown tells whether the address must be a pod's, and nobody knows whose.
func (s *Snapshot) Unknown(a netip.Addr) bool {
	if s.ranges == nil || !a.IsValid() || a.Zone() != "" {
		return false
	}
	k := keyOf(a.Unmap())
	return s.isUnknown(&k)
}

func (s *Snapshot) isUnknown(k *addrKey) bool { return s.ranges.hold(k) && !s.ends.find(k).used }

// noteUnknown marks a decision about an end that is an unknown pod's. It is short
// enough to be inlined: most decisions are about two known ends.
func (s *Snapshot) noteUnknown(f *Flow, key *flowKey, d *Decision) {
	if s.ranges != nil && (d.Src == nil || d.Dst == nil) {
		s.markUnknown(f, key, d)
	}
}

// markUnknown marks the decision if an end is an unknown pod's, and gives it the
// verdict for those. A denial for another reason stays with it, but only for as long
// as the pod isn't known.
func (s *Snapshot) markUnknown(f *Flow, key *flowKey, d *Decision) {
	if d.Reason == ReasonNeighbour || !f.Src.IsValid() || !f.Dst.IsValid() {
		return
	}
	if (d.Src != nil || !s.isUnknown(&key.src)) && (d.Dst != nil || !s.isUnknown(&key.dst)) {
		return
	}
	d.Unknown = true
	switch {
	case d.Verdict == Deny:
	case s.ranges.verdict == Deny:
		d.Verdict, d.Reason = denial(s.auditOnly), ReasonUnknownPod
	case d.Reason == ReasonNotIsolated:
		d.Reason = ReasonUnknownPod
	}
}

// Vacated lists the judged addresses that another pod has, or nobody, than in the
// snapshot before: what was decided, or is remembered elsewhere, about the address
// was about somebody who is gone. The slice belongs to the snapshot.
func (s *Snapshot) Vacated() []netip.Addr { return s.vacated }

// vacates tells whether the end's pod is one that is judged here and isn't the other
// end's. Two pods of one name are two (their UIDs differ).
func (e *end) vacates(now *end) bool {
	if !e.judged {
		return false
	}
	return now.endpoint == nil || now.endpoint.UID != e.endpoint.UID ||
		now.endpoint.Namespace != e.endpoint.Namespace || now.endpoint.Name != e.endpoint.Name
}
