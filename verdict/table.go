package verdict

import (
	"cmp"
	"net/netip"
	"slices"
)

// PeerSelector admits the pods whose namespace the one selector matches and
// whose labels the other.
type PeerSelector struct {
	Namespace, Pod SelectorID
}

// Rule is one ingress or egress rule, ready to compile. A rule admits a flow
// when one of its peers and one of its ports match.
type Rule struct {
	// Index is the rule's place in its policy's list.
	Index int
	// AnyPeer is set when the API rule names no peers.
	AnyPeer   bool
	Selectors []PeerSelector
	Blocks    []Block
	// AnyPort is set when the API rule names no ports: then protocols
	// without ports match too.
	AnyPort bool
	Ports   []PortRange
	// Names are named ports that are to be resolved at each destination, as
	// in egress rules. (Ingress rules' names are resolved by the caller, who
	// knows the destination.)
	Names []PortName
}

// Policy is what one NetworkPolicy says about one direction.
type Policy struct {
	Name  string // "namespace/name"
	Rules []Rule
}

// Table is the union of the policies that isolate a pod in one direction. It is
// immutable and is shared by all pods that the same policies isolate.
//
// Its rows are the ways to be admitted, in order of policy name and rule. Most
// tables have few, and those are narrow: all that a decision reads of them lies
// side by side in four cache lines, so that its loads don't wait for each other.
// The others are wide, and the fields of a narrow one are then empty.
type Table struct {
	anyPeer, anyPort uint16 // rows without a peer test, and without a port test
	byBlock          uint16 // rows whose peers are blocks
	// portRows are open from the port that portStarts has one place before them
	// up to the next start; the first are open below all starts. See portKey.
	portRows   [narrowPorts + 1]uint16
	portStarts [narrowPorts]uint32
	blocks     *narrowBlockIndex // nil when no row is by block

	names    map[PortName]uint16 // nil when no rule has a name
	wide     *wideTable          // nil when the table is narrow
	refs     []RuleRef           // each row's rule
	policies []string

	peers [narrowRows]PeerSelector // of the rows with selectors

	blocksOf map[RuleRef][]Block // as they were given, for Block
}

// NewTable compiles policies. The bitmaps are read only for tables with many
// distinct selectors; see DependsOnBits.
func NewTable(policies []Policy, namespaceBits, podBits []Bits) *Table {
	policies = slices.Clone(policies)
	slices.SortFunc(policies, func(a, b Policy) int { return cmp.Compare(a.Name, b.Name) })
	t := &Table{}
	var rules []Rule
	var rowsOf [][]int
	for _, p := range policies {
		t.policies = append(t.policies, p.Name)
		for _, r := range p.Rules {
			rules = append(rules, r)
			t.keepBlocks(RuleRef{p.Name, r.Index}, r.Blocks)
			rowsOf = append(rowsOf, t.addRows(p.Name, r))
		}
	}
	t.policies, t.refs = slices.Clip(t.policies), slices.Clip(t.refs)
	if !t.buildNarrow(rules, rowsOf, len(t.refs)) {
		*t = Table{refs: t.refs, policies: t.policies, blocksOf: t.blocksOf}
		t.wide = newWideTable(rules, rowsOf, len(t.refs), namespaceBits, podBits)
	}
	return t
}

// addRows gives a rule its rows: one for any peer, or else one for all its
// blocks together and one for each selector.
func (t *Table) addRows(policy string, r Rule) []int {
	n := len(r.Selectors)
	if len(r.Blocks) > 0 {
		n++
	}
	if r.AnyPeer {
		n = 1
	}
	var mine []int
	for range n {
		mine = append(mine, len(t.refs))
		t.refs = append(t.refs, RuleRef{Policy: policy, Rule: r.Index})
	}
	return mine
}

// Policies are the names of the policies that the table unites, sorted. The
// slice is the table's own.
func (t *Table) Policies() []string { return t.policies }

func (t *Table) keepBlocks(ref RuleRef, blocks []Block) {
	if len(blocks) == 0 {
		return
	}
	if t.blocksOf == nil {
		t.blocksOf = map[RuleRef][]Block{}
	}
	t.blocksOf[ref] = blocks
}

// Block gives the CIDR of the first ipBlock of a rule that holds the address,
// the zero Prefix if none does. Decisions don't use it: it walks the blocks.
func (t *Table) Block(ref RuleRef, a netip.Addr) netip.Prefix {
	for _, b := range t.blocksOf[ref] {
		except := func(p netip.Prefix) bool { return p.Contains(a) }
		if b.CIDR.Contains(a) && !slices.ContainsFunc(b.Except, except) {
			return b.CIDR
		}
	}
	return netip.Prefix{}
}

// DependsOnBits tells whether the table was compiled against the bitmaps as
// they were, and so must be compiled again when bitmaps change.
func (t *Table) DependsOnBits() bool {
	return t.wide != nil && !(t.wide.namespace.scans() && t.wide.labels.scans())
}

// open gives the rows of a narrow table that admit the port of a flow, whatever
// its peer. dst is the destination where its named ports count, and nobody where
// they have been resolved.
func (t *Table) open(f *Flow, dst *end) uint16 {
	if t.wide != nil {
		return 0
	}
	open := t.anyPort | t.openAt(portKey(f.Proto, f.DstPort))
	if t.names != nil && dst.names&nameBit(f.Proto, f.DstPort) != 0 {
		open |= t.named(f, dst.endpoint.Ports)
	}
	return open
}

// admit finds the first rule that admits a flow between the table's pod and a
// peer at an address; open and dst are as in open.
func (t *Table) admit(s *Snapshot, peer *end, key *addrKey, f *Flow, open uint16, dst *end) (RuleRef, bool) {
	var row int
	var ok bool
	if t.wide == nil {
		row, ok = t.admitNarrow(s, peer, key, open)
	} else {
		row, ok = t.wide.admit(s, peer, key, f, dst)
	}
	if !ok {
		return RuleRef{}, false
	}
	return t.refs[row], true
}
