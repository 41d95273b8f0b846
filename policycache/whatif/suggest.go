package whatif

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"portcullis/verdict"
)

// Suggest gathers a log's evidence of who connects to whom, for policies that
// admit just that.
type Suggest struct {
	state    *State
	options  SuggestOptions
	subjects map[*group]*subject
	report   SuggestReport
	gone     map[string]uint64
}

// SuggestOptions say what is suggested, and for whom.
type SuggestOptions struct {
	// Namespace is the only one that gets policies; empty means all do.
	Namespace string
	// Complete says that the log holds every connection, as that of an agent
	// which records all does, and not those of isolated pods only.
	Complete bool
	// Bits4 and Bits6 are the prefix lengths to which external addresses are
	// widened; 32 and 128 leave them as they are.
	Bits4, Bits6 int
}

// SuggestReport says what of a log is not in the suggestions, in connections.
type SuggestReport struct {
	Connections uint64
	// Inadmissible are allowed connections that no rule can admit once policy
	// isolates an end: packets that couldn't be read whole, and port 0.
	Inadmissible uint64
	// NotPlaced are those whose ends aren't in the state any more.
	NotPlaced []NotPlaced
	// Unisolated are workloads without a suggestion because no policy isolates
	// them and no agent recorded what isn't judged, so that the log need not hold
	// all of their connections; sorted.
	Unisolated []string
}

// subject is what the log tells about one workload.
type subject struct {
	group *group
	// isolated tells whether some policy isolates it in some direction: then
	// the agents judge and log all of its connections. recorded tells whether an
	// agent recorded those that aren't judged, too.
	isolated, recorded bool
	egress, ingress    evidence
}

// evidence is what was seen in one direction.
type evidence struct {
	judged bool // whether the direction was judged at all
	denied uint64
	peers  map[peer]map[port]*seen
}

// peer is the other end: a workload, or else addresses outside.
type peer struct {
	group *group
	block netip.Prefix
}

// port is what was connected to; the number is 0 for protocols without ports.
type port struct {
	proto  verdict.Protocol
	number uint16
}

type seen struct {
	count uint64
	span
}

// NewSuggest makes a Suggest for pods of a state, whose policies count only as
// far as they tell who is isolated today.
func NewSuggest(s *State, o SuggestOptions) *Suggest {
	return &Suggest{state: s, options: o, subjects: map[*group]*subject{}, gone: map[string]uint64{}}
}

// Add takes a record as evidence. One that was denied tells only that the
// direction is judged; so does one that needs no rule, between a pod and itself
// or its node.
func (g *Suggest) Add(r *Record) {
	g.report.Connections += r.Count
	if r.unasked() {
		return
	}
	f, _, err := g.state.place(r)
	if err != nil {
		g.gone[err.Error()] += r.Count
		return
	}
	src, dst := g.groupAt(f.Src), g.groupAt(f.Dst)
	admissible := f.Defect == verdict.ReasonNone && !(f.Proto.HasPorts() && f.DstPort == 0)
	if r.allowed() && !r.exempt() && !admissible {
		g.report.Inadmissible += r.Count
	}
	p := port{f.Proto, f.DstPort}
	note := func(of *group, direction string, side *Side, e *evidence, other peer) {
		s := g.subjects[of]
		s.isolated = s.isolated || side != nil && side.Isolated
		s.recorded = s.recorded || r.Observed
		e.judged = true
		switch {
		case r.exempt():
		case !r.allowed():
			e.denied += r.Count
		case admissible:
			e.add(other, p, r)
		}
	}
	if src != nil && r.judged(egress) {
		note(src, egress, r.Egress, &g.subject(src, f.Src).egress, g.peer(dst, f.Dst))
	}
	if dst != nil && r.judged(ingress) {
		note(dst, ingress, r.Ingress, &g.subject(dst, f.Dst).ingress, g.peer(src, f.Src))
	}
}

// groupAt gives the workload of the pod that owns an address, nil if none does.
func (g *Suggest) groupAt(a netip.Addr) *group {
	if e := g.state.snap.Endpoint(a); e != nil {
		return g.state.workloads.groups[e.Key()]
	}
	return nil
}

func (g *Suggest) subject(of *group, a netip.Addr) *subject {
	s := g.subjects[of]
	if s == nil {
		s = &subject{group: of}
		g.subjects[of] = s
	}
	s.isolated = s.isolated || g.state.snap.Endpoint(a).Isolated()
	return s
}

func (g *Suggest) peer(of *group, a netip.Addr) peer {
	if of != nil {
		return peer{group: of}
	}
	bits := g.options.Bits4
	if a.Is6() {
		bits = g.options.Bits6
	}
	return peer{block: netip.PrefixFrom(a, bits).Masked()}
}

func (e *evidence) add(other peer, p port, r *Record) {
	if e.peers == nil {
		e.peers = map[peer]map[port]*seen{}
	}
	ports := e.peers[other]
	if ports == nil {
		ports = map[port]*seen{}
		e.peers[other] = ports
	}
	s := ports[p]
	if s == nil {
		s = &seen{}
		ports[p] = s
	}
	s.count += r.Count
	s.add(r.Time)
}

// Report says what the suggestions lack.
func (g *Suggest) Report() *SuggestReport {
	report := g.report
	for _, why := range slices.Sorted(maps.Keys(g.gone)) {
		report.NotPlaced = append(report.NotPlaced, NotPlaced{why, g.gone[why]})
	}
	for _, s := range g.sorted() {
		if !g.suggests(s) {
			report.Unisolated = append(report.Unisolated, s.group.String())
		}
	}
	return &report
}

// sorted gives the subjects of the wanted namespace in the order of their names.
func (g *Suggest) sorted() []*subject {
	var all []*subject
	for _, s := range g.subjects {
		if g.options.Namespace == "" || s.group.namespace == g.options.Namespace {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b *subject) int { return compareGroups(a.group, b.group) })
	return all
}

// suggests tells whether a subject's connections are all in the log, so that a
// policy which admits those, and no others, breaks nothing.
func (g *Suggest) suggests(s *subject) bool { return s.isolated || s.recorded || g.options.Complete }

// rule is peers that were seen on the same ports.
type rule struct {
	peers []peer
	ports []port // sorted; empty if a protocol without ports is among those seen
	seen  []map[port]*seen
}

// rules gives the fewest rules with one list of ports each that admit what was
// seen, in the order of their first peers.
func (e *evidence) rules() []*rule {
	peers := slices.SortedFunc(maps.Keys(e.peers), comparePeers)
	byPorts := map[string]*rule{}
	var rules []*rule
	for _, p := range peers {
		ports := slices.SortedFunc(maps.Keys(e.peers[p]), comparePorts)
		// A rule with ports never admits a protocol without.
		if slices.ContainsFunc(ports, func(p port) bool { return !p.proto.HasPorts() }) {
			ports = nil
		}
		key := fmt.Sprint(ports)
		r := byPorts[key]
		if r == nil {
			r = &rule{ports: ports}
			byPorts[key] = r
			rules = append(rules, r)
		}
		r.peers = append(r.peers, p)
		r.seen = append(r.seen, e.peers[p])
	}
	return rules
}

// comparePeers puts workloads, by name, before blocks, by number.
func comparePeers(a, b peer) int {
	switch {
	case a.group != nil && b.group != nil:
		return compareGroups(a.group, b.group)
	case a.group != nil:
		return -1
	case b.group != nil:
		return 1
	}
	return cmp.Or(a.block.Addr().Compare(b.block.Addr()), cmp.Compare(a.block.Bits(), b.block.Bits()))
}

func comparePorts(a, b port) int {
	return cmp.Or(cmp.Compare(a.proto, b.proto), cmp.Compare(a.number, b.number))
}

// String continues a sentence: "to TCP 80", or "by ICMP".
func (p port) String() string {
	if p.proto.HasPorts() {
		return fmt.Sprintf("to %s %d", p.proto, p.number)
	}
	return "by " + p.proto.String()
}

// described says what was seen of a rule's peer i: "shop/web: 12 connections to
// TCP 80, 2026-…".
func (r *rule) described(i int) string {
	var words []string
	var all span
	for _, p := range slices.SortedFunc(maps.Keys(r.seen[i]), comparePorts) {
		s := r.seen[i][p]
		words = append(words, fmt.Sprintf("%s %s", connections(s.count), p))
		all.add(s.first)
		all.add(s.last)
	}
	name := r.peers[i].block.String()
	if g := r.peers[i].group; g != nil {
		name = g.String()
	} else if r.peers[i].block.IsSingleIP() {
		name = r.peers[i].block.Addr().String()
	}
	return fmt.Sprintf("%s: %s, %s", name, strings.Join(words, ", "), all.String())
}
