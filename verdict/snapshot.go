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
	// Versions are the policies' resourceVersions, by "namespace/name", for the
	// decision log; no decision depends on them.
	Versions map[string]string
	// AuditOnly lets pass even what can't be laid to any pod: packets whose
	// addresses can't be read.
	AuditOnly bool
	// Ranges are the node's pod ranges, nil for none.
	Ranges *PodRanges
}

// stampSlots is how finely cached verdicts are told apart when something
// changes: an address shares its stamp with one in so many others.
const stampSlots = 1024

// Change is what makes a snapshot out of the one before. Next keeps it: the
// caller must not change any of it afterwards.
type Change struct {
	// Generation numbers the new snapshot, higher than the one before.
	Generation uint64
	// Owners and Nodes hold the addresses whose pod, or whose nodes, are others
	// than before, as in Input: nil for those that nobody has any more.
	Owners map[netip.Addr]*Endpoint
	Nodes  map[netip.Addr][]string
	// NamespaceBits and PodBits are as in Input. Those that haven't changed may
	// be the ones of before.
	NamespaceBits, PodBits []Bits
	// Versions hold the policies whose versions are others than before, as in
	// Input: "" for those that have none any more.
	Versions  map[string]string
	AuditOnly bool
	// Ranges are as in Input, those of before if they haven't changed.
	Ranges *PodRanges
}

// Snapshot is the cluster's compiled policy at one moment. It is immutable;
// any number of goroutines may use it at once.
type Snapshot struct {
	generation             uint64
	ends                   endTable
	namespaceBits, podBits []Bits
	versions               versions
	auditOnly              bool
	isolated, judged       *addrList
	ranges                 *PodRanges
	known                  *addrList // within the ranges
	vacated                []netip.Addr
	// stamps hold, by an address's slot, the generation in which the meaning
	// of some address of that slot last changed.
	stamps [stampSlots]uint64
	// changed are the addresses whose meaning is another than in the snapshot
	// before.
	changed []netip.Addr
}

// NewSnapshot makes a snapshot. prev is the one that it follows, nil for the
// first: addresses that mean the same in both keep their stamps, so that
// cached verdicts between them stay usable.
func NewSnapshot(in Input, prev *Snapshot) *Snapshot {
	c := Change{in.Generation, map[netip.Addr]*Endpoint{}, map[netip.Addr][]string{}, in.NamespaceBits, in.PodBits, map[string]string{}, in.AuditOnly, in.Ranges}
	maps.Copy(c.Owners, in.Owners)
	maps.Copy(c.Nodes, in.Nodes)
	maps.Copy(c.Versions, in.Versions)
	if prev == nil {
		prev = &Snapshot{ends: newEndTable(1), isolated: new(addrList), judged: new(addrList), known: new(addrList)}
		for i := range prev.stamps {
			prev.stamps[i] = in.Generation
		}
	}
	prev.ends.each(func(e *end) {
		a := e.addr()
		if e.endpoint != nil && c.Owners[a] == nil {
			c.Owners[a] = nil
		}
		if e.nodes != nil && c.Nodes[a] == nil {
			c.Nodes[a] = nil
		}
	})
	for policy := range prev.versions.together() {
		if in.Versions[policy] == "" {
			c.Versions[policy] = ""
		}
	}
	return prev.Next(c)
}

// Next makes the snapshot that follows this one, which stays as it is. It costs
// what has changed, and shares all else.
func (s *Snapshot) Next(c Change) *Snapshot {
	n := &Snapshot{generation: c.Generation, namespaceBits: c.NamespaceBits, podBits: c.PodBits, versions: s.versions.with(c.Versions),
		auditOnly: c.AuditOnly, ranges: c.Ranges, stamps: s.stamps}
	ends := s.ends.edit()
	var isolated, judged, known addrChange
	change := func(a netip.Addr, k addrKey, old *end, pod *Endpoint, nodes *[]string) {
		now := newEnd(k, pod, nodes)
		if old.meaning() != now.meaning() {
			n.stamps[k.stampSlot()] = n.generation
			n.changed = append(n.changed, a)
		}
		isolated.note(a, old.isIsolated(), now.isIsolated())
		judged.note(a, old.judged, now.judged)
		if n.ranges.hold(&k) {
			known.note(a, old.used, now.used)
		}
		if old.vacates(&now) {
			n.vacated = append(n.vacated, a)
		}
		ends.put(now)
	}
	for a, pod := range c.Owners {
		k := keyOf(a)
		old := s.ends.find(&k)
		nodes := old.nodes
		if names, changed := c.Nodes[a]; changed {
			nodes = nodesOrNil(names)
		}
		change(a, k, old, pod, nodes)
	}
	for a, names := range c.Nodes {
		if _, done := c.Owners[a]; !done {
			k := keyOf(a)
			old := s.ends.find(&k)
			change(a, k, old, old.endpoint, nodesOrNil(names))
		}
	}
	n.ends = ends.endTable
	n.isolated, n.judged = isolated.apply(s.isolated), judged.apply(s.judged)
	n.known = known.apply(s.known)
	if n.ranges != s.ranges { // another thing to know of any address
		n.known = new(addrList)
		for i := range n.stamps {
			n.stamps[i] = n.generation
		}
	}
	return n
}

// nodesOrNil is nil for no nodes.
func nodesOrNil(names []string) *[]string {
	if len(names) == 0 {
		return nil
	}
	return &names
}

var nodeSeed = maphash.MakeSeed()

// meaning is all that decisions know of an address, as one number: a pod, a
// node, or neither.
func (e *end) meaning() uint64 {
	if e.endpoint != nil {
		return e.endpoint.Meaning
	}
	var h maphash.Hash
	h.SetSeed(nodeSeed)
	if e.nodes != nil {
		for _, name := range *e.nodes {
			h.WriteString(name)
			h.WriteByte('/')
		}
	}
	return h.Sum64()
}

// stampSlot spreads addresses over the stamps.
func (k *addrKey) stampSlot() uint64 { return k.hash() >> 54 }

// Generation numbers the snapshot; a later one has a greater number.
func (s *Snapshot) Generation() uint64 { return s.generation }

// end gives what is known of an address.
func (s *Snapshot) end(a netip.Addr) *end {
	if a = a.Unmap(); !a.IsValid() || a.Zone() != "" {
		return &nobody
	}
	k := keyOf(a)
	return s.ends.find(&k)
}

// Endpoint gives the pod that owns the address, nil when none does.
func (s *Snapshot) Endpoint(a netip.Addr) *Endpoint { return s.end(a).endpoint }

// nodesOf gives the names of the nodes that have the address.
func (s *Snapshot) nodesOf(a netip.Addr) []string {
	if e := s.end(a); e.nodes != nil {
		return *e.nodes
	}
	return nil
}

// Node gives the name of the node that has the address, "" when none does.
func (s *Snapshot) Node(a netip.Addr) string {
	if names := s.nodesOf(a); len(names) > 0 {
		return names[0]
	}
	return ""
}

// PolicyVersion gives the version of a policy by its "namespace/name", "" when
// there is none.
func (s *Snapshot) PolicyVersion(policy string) string { return s.versions.of(policy) }

// Decide judges a flow without any cache. It allocates nothing.
func (s *Snapshot) Decide(f *Flow) Decision {
	var d Decision
	key := flowKeyOf(f)
	s.decide(f, &key, &d)
	s.noteUnknown(f, &key, &d)
	return d
}

// decide fills d, which must be zero. key is the flow's.
func (s *Snapshot) decide(f *Flow, key *flowKey, d *Decision) {
	if !f.Src.IsValid() || !f.Dst.IsValid() {
		d.Egress.Verdict, d.Ingress.Verdict = Allow, Allow
		d.refuse(f, s.auditOnly)
		return
	}
	src, dst := s.ends.find(&key.src), s.ends.find(&key.dst)
	d.Src, d.Dst = src.endpoint, dst.endpoint
	d.Egress.open(src, src.egress, true)
	d.Ingress.open(dst, dst.ingress, false)
	if reason := exempt(f, src, dst); reason != ReasonNone {
		d.Verdict, d.Reason = Allow, reason
		return
	}
	if f.Defect != ReasonNone {
		d.refuse(f, s.auditOnly)
		return
	}
	// Both tables are read before either is followed any further: the
	// processor then waits for their memory at once, not one by one.
	var openOut, openIn uint16
	if src.egress != nil {
		openOut = src.egress.open(f, dst)
	}
	if dst.ingress != nil {
		openIn = dst.ingress.open(f, &nobody)
	}
	if src.egress != nil {
		d.Egress.close(src.egress.admit(s, src, dst, &key.dst, f, openOut, dst))
	}
	if dst.ingress != nil {
		d.Ingress.close(dst.ingress.admit(s, dst, src, &key.src, f, openIn, &nobody))
	}
	d.conclude()
}

// exempt gives the reason why no policy applies, ReasonNone when policies do:
//   - ICMPv6 router and neighbour discovery and redirect (RFC 4861, types 133
//     to 137) keep the link itself alive and are never blocked;
//   - a pod always reaches itself, by any of its addresses;
//   - traffic between a node and its own pods is always allowed, whatever
//     policies say (the API documentation of NetworkPolicy).
func exempt(f *Flow, src, dst *end) Reason {
	switch {
	case isNeighbourDiscovery(f):
		return ReasonNeighbour
	case src.endpoint != nil && src.endpoint == dst.endpoint:
		return ReasonSelf
	case dst.endpoint == nil && dst.isNodeOf(src), src.endpoint == nil && src.isNodeOf(dst):
		return ReasonOwnNode
	}
	return ReasonNone
}

// isNeighbourDiscovery asks for IPv6 too: protocol 58 inside IPv4 is nothing
// that a link needs, and mustn't be a way around the gate.
func isNeighbourDiscovery(f *Flow) bool {
	return f.Proto == ICMPv6 && f.Dst.Is6() && f.ICMPType >= 133 && f.ICMPType <= 137
}

// isNodeOf tells whether the end's address is one of the pod's node's.
func (e *end) isNodeOf(pod *end) bool {
	return e.nodes != nil && pod.endpoint != nil && slices.Contains(*e.nodes, pod.endpoint.Node)
}

// open notes whether the end is judged and isolated, and allows until close says otherwise.
func (d *Side) open(e *end, m *match, egress bool) {
	d.Verdict, d.Judged, d.Isolated, d.pod = Allow, e.judged, m != nil, e.endpoint
	d.flags = 0
	if egress {
		d.flags = sideEgress
	}
	if e.auditOnly && e.judged {
		d.flags |= sideAuditOnly
	}
}

// close notes the outcome of an isolated end: the row that admits the flow, or 0. It
// does without a branch, which the processor couldn't foresee.
func (d *Side) close(row uint32) {
	admitted := min(row, 1)
	wouldDeny := uint32(d.flags) & sideAuditOnly &^ (admitted << 1)
	d.row, d.Verdict = row, Verdict(admitted|wouldDeny)
}

// close relies on these: Deny is 0, Allow is 1, WouldDeny is sideAuditOnly.
var _ = [1]int{}[int(Deny)|int(Allow)^1|int(WouldDeny)^sideAuditOnly]

// Refuse denies on behalf of the side, or says that it would.
func (d *Side) Refuse() { d.Verdict = denial(d.AuditOnly()) }

func denial(auditOnly bool) Verdict {
	if auditOnly {
		return WouldDeny
	}
	return Deny
}

// refuse concludes for a flow that can't be held against rules: an isolated end
// turns it away, and so does not knowing the ends at all.
func (d *Decision) refuse(f *Flow, auditOnly bool) {
	if d.Egress.Isolated {
		d.Egress.Refuse()
	}
	if d.Ingress.Isolated {
		d.Ingress.Refuse()
	}
	d.conclude()
	known := f.Src.IsValid() && f.Dst.IsValid()
	if d.Verdict == Allow && known {
		return
	}
	if !known {
		d.Verdict = denial(auditOnly)
	}
	d.Reason = f.Defect
	if d.Reason == ReasonNone {
		d.Reason = ReasonMalformed
	}
}

// conclude draws the verdict from both sides: of one that denies and one that
// would, the first counts.
func (d *Decision) conclude() {
	switch {
	case min(d.Egress.Verdict, d.Ingress.Verdict) == Deny: // one is enough
		d.Verdict, d.Reason = Deny, ReasonNoRule
	case max(d.Egress.Verdict, d.Ingress.Verdict) == WouldDeny:
		d.Verdict, d.Reason = WouldDeny, ReasonNoRule
	case d.Egress.Isolated || d.Ingress.Isolated:
		d.Verdict, d.Reason = Allow, ReasonRule
	default:
		d.Verdict, d.Reason = Allow, ReasonNotIsolated
	}
}
