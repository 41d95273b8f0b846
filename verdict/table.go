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
// Its rows are the ways to be admitted, in order of policy name and rule. A decision
// reads what it tests of a flow, the match; the names are for those who ask why.
type Table struct {
	match    *match
	refs     []RuleRef // each row's rule
	policies []string
	blocks   map[RuleRef][]Block // as they were given, for Block
}

// match is what a table tests of a flow. Most tables have few rows, and are narrow:
// all that a decision reads of them, but for blocks of IPv6, are three cache lines
// side by side, which it asks for at once. The others are wide, and the fields of
// a narrow one are then empty. Tables whose policies differ in nothing but their
// names may share it, see Matches.
type match struct {
	// The first line.
	anyPeer, anyPort uint16 // rows without a peer test, and without a port test
	byBlock          uint16 // rows whose peers are blocks
	// portRows are open from the port that portStarts has one place before them
	// up to the next start; the first are open below all starts. See portKey.
	portRows   [narrowPorts + 1]uint16
	portStarts [narrowPorts / 2]uint64 // two a word, see openAt
	more       *matchMore              // nil where none of it is needed

	// The second.
	peers [narrowRows]narrowPeer // of the rows with selectors
	rare  uint32                 // rareWide, rareNames

	// The third.
	blocks4 narrowBlocks4
}

// What of a match a decision doesn't find in its three lines.
const (
	rareWide  = 1 << iota // the table is wide
	rareNames             // some rule has a named port
)

// matchMore is what most decisions don't read of a match.
type matchMore struct {
	blocks6 narrowBlocks6
	names   map[PortName]uint16 // nil when no rule has a name
	wide    *wideTable          // nil when the table is narrow
}

// matchOf is nil for no table.
func (t *Table) matchOf() *match {
	if t == nil {
		return nil
	}
	return t.match
}

// rest gives what is more, for writing.
func (m *match) rest() *matchMore {
	if m.more == nil {
		m.more = new(matchMore)
	}
	return m.more
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
			rowsOf = append(rowsOf, t.addRows(p.Name, r))
			t.keepBlocks(RuleRef{p.Name, r.Index}, r.Blocks)
		}
	}
	t.policies, t.refs = slices.Clip(t.policies), slices.Clip(t.refs)
	if t.match = newNarrow(rules, rowsOf, len(t.refs)); t.match == nil {
		wide := newWideTable(rules, rowsOf, len(t.refs), namespaceBits, podBits)
		t.match = &match{rare: rareWide, more: &matchMore{wide: wide}}
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
	if t.blocks == nil {
		t.blocks = map[RuleRef][]Block{}
	}
	t.blocks[ref] = blocks
}

// Block gives the CIDR of the first ipBlock of a rule that holds the address,
// the zero Prefix if none does. Decisions don't use it: it walks the blocks.
func (t *Table) Block(ref RuleRef, a netip.Addr) netip.Prefix {
	for _, b := range t.blocks[ref] {
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
	if t.match.rare&rareWide == 0 {
		return false
	}
	wide := t.match.more.wide
	return !wide.namespace.scans() || !wide.labels.scans()
}

// open gives the rows of a narrow table that admit the port of a flow, whatever
// its peer. dst is the destination where its named ports count, and nobody where
// they have been resolved.
func (m *match) open(f *Flow, dst *end) uint16 {
	// The first rows of blocks4 are none. To read them has their line on its way
	// before it is known whether it is needed.
	open := m.anyPort | m.openAt(portKey(f.Proto, f.DstPort)) | m.blocks4.rows[0]
	if m.rare&rareNames != 0 && dst.names&nameBit(f.Proto, f.DstPort) != 0 {
		open |= m.named(f, dst.endpoint.Ports)
	}
	return open
}

// admit finds the first row that admits a flow between the table's pod, the subject,
// and a peer at an address, and numbers it from 1 on; it is 0 if there is none. open and dst
// are as in open.
func (m *match) admit(s *Snapshot, subject, peer *end, key *addrKey, f *Flow, open uint16, dst *end) uint32 {
	if m.rare&rareWide != 0 {
		return m.more.wide.admit(s, subject, peer, key, f, dst)
	}
	return m.admitNarrow(s, subject, peer, key, open)
}
