package verdict

import (
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
)

// Input is everything that a snapshot is made of. NewSnapshot keeps it: the
// caller must not change any of it afterwards.
type Input struct {
	Generation uint64
	// Owners maps each pod address to its pod.
	Owners map[netip.Addr]*Endpoint
	// Nodes maps the addresses of nodes to the names of the nodes that have
	// them, sorted: as a rule one.
	Nodes map[netip.Addr][]string
	// NamespaceBits and PodBits hold, by SelectorID, which namespaces
	// (Endpoint.NamespaceIndex) or label sets (Endpoint.LabelsIndex) a
	// selector matches.
	NamespaceBits, PodBits []Bits
	// Versions are those of the policies, by "namespace/name", for the decision
	// log: no decision depends on them. A policy without one is left out.
	Versions map[string]string
}

// stampSlots is how finely cached verdicts are told apart when something
// changes: an address shares its stamp with one in so many others.
const stampSlots = 1024

// Snapshot is the cluster's compiled policy at one moment. It is immutable;
// any number of goroutines may use it at once.
type Snapshot struct {
	generation             uint64
	owners                 map[netip.Addr]*Endpoint
	nodes                  map[netip.Addr][]string
	namespaceBits, podBits []Bits
	versions               map[string]string
	// stamps hold, by an address's slot, the generation in which the meaning
	// of some address of that slot last changed.
	stamps [stampSlots]uint64
}

// NewSnapshot makes a snapshot. prev is the one that it follows, nil for the
// first: addresses that mean the same in both keep their stamps, so that
// cached verdicts between them stay usable.
func NewSnapshot(in Input, prev *Snapshot) *Snapshot {
	s := &Snapshot{
		generation:    in.Generation,
		owners:        in.Owners,
		nodes:         in.Nodes,
		namespaceBits: in.NamespaceBits,
		podBits:       in.PodBits,
		versions:      in.Versions,
	}
	if prev == nil {
		for i := range s.stamps {
			s.stamps[i] = s.generation
		}
		return s
	}
	s.stamps = prev.stamps
	s.restamp(prev, maps.Keys(s.owners))
	s.restamp(prev, maps.Keys(s.nodes))
	s.restamp(prev, maps.Keys(prev.owners))
	s.restamp(prev, maps.Keys(prev.nodes))
	return s
}

func (s *Snapshot) restamp(prev *Snapshot, addrs func(func(netip.Addr) bool)) {
	for a := range addrs {
		if s.meaning(a) != prev.meaning(a) {
			s.stamps[stampSlot(a)] = s.generation
		}
	}
}

var nodeSeed = maphash.MakeSeed()

// meaning is all that decisions know of an address, as one number: a pod, a
// node, or neither.
func (s *Snapshot) meaning(a netip.Addr) uint64 {
	if e := s.owners[a]; e != nil {
		return e.Meaning
	}
	var h maphash.Hash
	h.SetSeed(nodeSeed)
	for _, name := range s.nodes[a] {
		h.WriteString(name)
		h.WriteByte('/')
	}
	return h.Sum64()
}

// stampSlot spreads addresses over the stamps.
func stampSlot(a netip.Addr) uint64 {
	hi, lo := halves(a)
	return slotOf(hi, lo)
}

func slotOf(hi, lo uint64) uint64 {
	const odd = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio
	return ((hi*odd ^ lo) * odd) >> 54
}

// Generation numbers the snapshot; a later one has a greater number.
func (s *Snapshot) Generation() uint64 { return s.generation }

// Endpoint gives the pod that owns the address, nil when none does.
func (s *Snapshot) Endpoint(a netip.Addr) *Endpoint { return s.owners[a.Unmap()] }

// Node gives the name of the node that has the address, "" when none does.
func (s *Snapshot) Node(a netip.Addr) string {
	if names := s.nodes[a.Unmap()]; len(names) > 0 {
		return names[0]
	}
	return ""
}

// PolicyVersion gives the version of a policy by its "namespace/name", "" when
// there is none.
func (s *Snapshot) PolicyVersion(policy string) string { return s.versions[policy] }

// IsolatedAddrs lists the addresses of the judged pods that are isolated in
// some direction, sorted: those whose packets the kernel has to queue.
func (s *Snapshot) IsolatedAddrs() []netip.Addr {
	var addrs []netip.Addr
	for a, e := range s.owners {
		if e.Judged && e.Isolated() {
			addrs = append(addrs, a)
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// JudgedAddrs lists the addresses of all judged pods, isolated or not, sorted.
func (s *Snapshot) JudgedAddrs() []netip.Addr {
	var addrs []netip.Addr
	for a, e := range s.owners {
		if e.Judged {
			addrs = append(addrs, a)
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// Decide judges a flow without any cache. It allocates nothing.
func (s *Snapshot) Decide(f *Flow) Decision {
	var d Decision
	s.decide(f, &d)
	return d
}

// decide fills d, which must be zero.
func (s *Snapshot) decide(f *Flow, d *Decision) {
	d.Src, d.Dst = s.owners[f.Src], s.owners[f.Dst]
	d.Egress.open(d.Src, egressOf(d.Src))
	d.Ingress.open(d.Dst, ingressOf(d.Dst))
	if reason := s.exempt(f, d); reason != ReasonNone {
		d.Verdict, d.Reason = Allow, reason
		return
	}
	if f.Defect != ReasonNone || !f.Src.IsValid() || !f.Dst.IsValid() {
		d.refuse(f)
		return
	}
	if d.Egress.Isolated {
		ref, ok := d.Src.Egress.admit(s, d.Dst, f.Dst, f, namesOf(d.Dst))
		d.Egress.close(ref, ok)
	}
	if d.Ingress.Isolated {
		ref, ok := d.Dst.Ingress.admit(s, d.Src, f.Src, f, nil)
		d.Ingress.close(ref, ok)
	}
	d.conclude()
}

// exempt gives the reason why no policy applies, ReasonNone when policies do:
//   - ICMPv6 router and neighbour discovery and redirect (RFC 4861, types 133
//     to 137) keep the link itself alive and are never blocked;
//   - a pod always reaches itself, by any of its addresses;
//   - traffic between a node and its own pods is always allowed, whatever
//     policies say (the API documentation of NetworkPolicy).
func (s *Snapshot) exempt(f *Flow, d *Decision) Reason {
	switch {
	case isNeighbourDiscovery(f):
		return ReasonNeighbour
	case d.Src != nil && d.Src == d.Dst:
		return ReasonSelf
	case d.Src != nil && d.Dst == nil && s.isNode(f.Dst, d.Src.Node),
		d.Dst != nil && d.Src == nil && s.isNode(f.Src, d.Dst.Node):
		return ReasonOwnNode
	}
	return ReasonNone
}

// isNeighbourDiscovery asks for IPv6 too: protocol 58 inside IPv4 is nothing
// that a link needs, and mustn't be a way around the gate.
func isNeighbourDiscovery(f *Flow) bool {
	return f.Proto == ICMPv6 && f.Dst.Is6() && f.ICMPType >= 133 && f.ICMPType <= 137
}

// isNode tells whether the address is one of the named node's.
func (s *Snapshot) isNode(a netip.Addr, node string) bool {
	return slices.Contains(s.nodes[a], node)
}

func egressOf(e *Endpoint) *Table {
	if e == nil {
		return nil
	}
	return e.Egress
}

func ingressOf(e *Endpoint) *Table {
	if e == nil {
		return nil
	}
	return e.Ingress
}

func namesOf(e *Endpoint) []NamedPort {
	if e == nil {
		return nil
	}
	return e.Ports
}

// open notes whether the end is judged and isolated, and allows until close says otherwise.
func (d *Side) open(e *Endpoint, t *Table) {
	d.Verdict = Allow
	if e == nil || !e.Judged {
		return
	}
	d.Judged = true
	if t != nil {
		d.Isolated = true
		d.Policies = t.policies
	}
}

// close notes the outcome of an isolated end.
func (d *Side) close(ref RuleRef, admitted bool) {
	if admitted {
		d.AllowedBy = ref
		return
	}
	d.Verdict = Deny
}

// refuse concludes for a flow that can't be held against rules: an isolated end
// turns it away, and so does not knowing the ends at all.
func (d *Decision) refuse(f *Flow) {
	if d.Egress.Isolated {
		d.Egress.Verdict = Deny
	}
	if d.Ingress.Isolated {
		d.Ingress.Verdict = Deny
	}
	d.conclude()
	known := f.Src.IsValid() && f.Dst.IsValid()
	if d.Verdict == Allow && known {
		return
	}
	d.Verdict, d.Reason = Deny, f.Defect
	if d.Reason == ReasonNone {
		d.Reason = ReasonMalformed
	}
}

// conclude draws the verdict from both sides.
func (d *Decision) conclude() {
	switch {
	case d.Egress.Verdict == Deny || d.Ingress.Verdict == Deny:
		d.Verdict, d.Reason = Deny, ReasonNoRule
	case d.Egress.Isolated || d.Ingress.Isolated:
		d.Verdict, d.Reason = Allow, ReasonRule
	default:
		d.Verdict, d.Reason = Allow, ReasonNotIsolated
	}
}
