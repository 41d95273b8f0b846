package whatif

import (
	"errors"
	"net/netip"
	"slices"

	"portcullis/policycache/explain"
	"portcullis/verdict"
)

// placedEnd is what a pod that a log names is in a state.
type placedEnd struct {
	addrs []netip.Addr
	// standIn is true if another pod of the same workload stands for it.
	standIn bool
	err     error
}

// place gives the flow that a record's connection would be in the state. A pod
// is looked for by its name, whatever its address is now; if it has gone, but a
// pod of the same workload is there, that one stands for it. What was no pod is
// its address. The error says why there is no such flow.
func (s *State) place(r *Record) (f verdict.Flow, standIn bool, err error) {
	f = r.flow()
	if !r.src.IsValid() || !r.dst.IsValid() {
		return f, false, errors.New("the packet's addresses couldn't be read")
	}
	src, err := s.end(&r.Src, r.src)
	if err != nil {
		return f, false, err
	}
	dst, err := s.end(&r.Dst, r.dst)
	if err != nil {
		return f, false, err
	}
	for _, a := range preferring(src.addrs, r.src) {
		for _, b := range preferring(dst.addrs, r.dst) {
			if a.Is4() == b.Is4() {
				f.Src, f.Dst = a, b
				return f, src.standIn || dst.standIn, nil
			}
		}
	}
	return f, false, errors.New("its ends have no IP family in common any more")
}

// preferring puts the address of the log first, if it is among addrs, and then
// those of its family.
func preferring(addrs []netip.Addr, logged netip.Addr) []netip.Addr {
	rank := func(a netip.Addr) int {
		switch {
		case a == logged:
			return 0
		case a.Is4() == logged.Is4():
			return 1
		}
		return 2
	}
	addrs = slices.Clone(addrs)
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return rank(a) - rank(b) })
	return addrs
}

func (s *State) end(e *RecordEnd, addr netip.Addr) (placedEnd, error) {
	if e.Pod == "" {
		return placedEnd{addrs: []netip.Addr{addr}}, nil
	}
	key := e.Namespace + "/" + e.Pod
	p, ok := s.ends[key]
	if !ok {
		p = s.findPod(e.Namespace, e.Pod)
		s.ends[key] = p
	}
	return p, p.err
}

func (s *State) findPod(namespace, name string) placedEnd {
	end, err := s.cluster.End(namespace + "/" + name)
	var unknown *explain.UnknownPodError
	if errors.As(err, &unknown) {
		if other := s.workloads.standIn(namespace, name); other != "" {
			end, err = s.cluster.End(other)
			return placedEnd{addrs: end.Addrs, standIn: true, err: err}
		}
	}
	return placedEnd{addrs: end.Addrs, err: err}
}

// exempt tells whether the record's verdict is none that a policy could change:
// a pod and itself, a node and its own pods, neighbour discovery.
func (r *Record) exempt() bool {
	for _, e := range []verdict.Reason{verdict.ReasonSelf, verdict.ReasonOwnNode, verdict.ReasonNeighbour} {
		if r.Reason == e.String() {
			return true
		}
	}
	return false
}

// unasked tells whether the connection was decided before any policy was
// asked.
func (r *Record) unasked() bool {
	return r.Reason == verdict.ReasonForged.String() || r.Reason == verdict.ReasonNotReady.String() || r.Reason == verdict.ReasonUnknownPod.String()
}

// judgement gives what a decision says about some directions.
func judgement(d *verdict.Decision, directions []string) Judgement {
	all := verdict.Allow
	var j Judgement
	isolated := false
	side := func(direction string, s *verdict.Side) *Side {
		if !slices.Contains(directions, direction) || !s.Judged {
			return nil
		}
		if s.Verdict == verdict.Deny || s.Verdict == verdict.WouldDeny && all == verdict.Allow {
			all = s.Verdict
		}
		isolated = isolated || s.Isolated
		return newSide(s)
	}
	j.Egress, j.Ingress = side(egress, &d.Egress), side(ingress, &d.Ingress)
	j.Verdict = all.String()
	switch {
	case all == d.Verdict && d.Reason != verdict.ReasonRule && d.Reason != verdict.ReasonNoRule:
		j.Reason = d.Reason.String()
	case all != verdict.Allow:
		j.Reason = verdict.ReasonNoRule.String()
	case isolated:
		j.Reason = verdict.ReasonRule.String()
	default:
		j.Reason = verdict.ReasonNotIsolated.String()
	}
	return j
}

func newSide(s *verdict.Side) *Side {
	side := &Side{Verdict: s.Verdict.String(), Isolated: s.Isolated, Policies: s.Policies()}
	if side.Policies == nil {
		side.Policies = []string{}
	}
	if s.AllowedBy().Policy != "" {
		side.AllowedBy = &Rule{Policy: s.AllowedBy().Policy, Rule: s.AllowedBy().Rule}
	}
	return side
}
