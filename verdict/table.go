package verdict

import (
	"cmp"
	"math/bits"
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
type Table struct {
	words     int
	anyPeer   rows // rows without a peer test
	anyPort   rows // rows without a port test
	namespace axis
	labels    axis
	ports     [3]portIndex
	blocks    blockTrie
	names     map[PortName]rows // nil when no rule has a name
	refs      []RuleRef         // each row's rule
	policies  []string
	blocksOf  map[RuleRef][]Block // as they were given, for Block
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
	t.words = (len(t.refs) + 63) / 64
	t.buildPeers(rules, rowsOf, namespaceBits, podBits)
	t.buildPorts(rules, rowsOf)
	t.pack()
	return t
}

// pack moves all that a decision reads of the table, but for the trie and the
// names, into one piece of memory.
func (t *Table) pack() {
	any := rowSets{words: t.words}
	any.add(t.anyPeer)
	any.add(t.anyPort)
	all := []*rowSets{&any, &t.namespace.rows, &t.namespace.classRows, &t.labels.rows, &t.labels.classRows,
		&t.ports[0].rows, &t.ports[1].rows, &t.ports[2].rows, &t.blocks.rows}
	size := 0
	for _, s := range all {
		size += len(s.bits)
	}
	arena := make([]uint64, 0, size)
	for _, s := range all {
		s.moveTo(&arena)
	}
	t.anyPeer, t.anyPort = any.at(0), any.at(1)
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

func (t *Table) buildPeers(rules []Rule, rowsOf [][]int, namespaceBits, podBits []Bits) {
	t.anyPeer = newRows(t.words)
	namespaces, labels := newAxisBuilder(t.words), newAxisBuilder(t.words)
	var blocks []Block
	var blockRow []int
	for i, r := range rules {
		if r.AnyPeer {
			t.anyPeer.set(rowsOf[i][0])
			continue
		}
		row := rowsOf[i]
		if len(r.Blocks) > 0 {
			for _, b := range r.Blocks {
				blocks = append(blocks, b)
				blockRow = append(blockRow, row[0])
			}
			row = row[1:]
		}
		for j, s := range r.Selectors {
			namespaces.add(s.Namespace, row[j])
			labels.add(s.Pod, row[j])
		}
	}
	t.namespace = namespaces.build(namespaceBits)
	t.labels = labels.build(podBits)
	t.blocks = buildBlocks(blocks, blockRow, t.words, len(t.refs))
}

func (t *Table) buildPorts(rules []Rule, rowsOf [][]int) {
	t.anyPort = newRows(t.words)
	for i, r := range rules {
		for _, row := range rowsOf[i] {
			if r.AnyPort {
				t.anyPort.set(row)
			}
			for _, n := range r.Names {
				if t.names == nil {
					t.names = map[PortName]rows{}
				}
				if t.names[n] == nil {
					t.names[n] = newRows(t.words)
				}
				t.names[n].set(row)
			}
		}
	}
	for _, proto := range []Protocol{TCP, UDP, SCTP} {
		t.ports[portSlot(proto)] = buildPorts(proto, rules, rowsOf, t.words)
	}
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
func (t *Table) DependsOnBits() bool { return !t.namespace.scans() || !t.labels.scans() }

// admit finds the first rule that admits a flow between the table's pod and a
// peer. peer is nil when addr is no pod's; names are the destination's.
func (t *Table) admit(s *Snapshot, peer *Endpoint, addr netip.Addr, f *Flow, names []NamedPort) (RuleRef, bool) {
	var namespaceBuf, labelBuf, portBuf [scanLimit]rows
	inNamespace, withLabels := namespaceBuf[:0], labelBuf[:0]
	if peer != nil {
		inNamespace = t.namespace.match(s.namespaceBits, peer.NamespaceIndex, inNamespace)
		if len(inNamespace) > 0 {
			withLabels = t.labels.match(s.podBits, peer.LabelsIndex, withLabels)
		}
	}
	inBlock := t.blocks.lookup(addr)
	ports := t.matchPorts(f.Proto, f.DstPort, names, portBuf[:0])
	for w := range t.words {
		var n, l uint64
		for _, r := range inNamespace {
			n |= r[w]
		}
		for _, r := range withLabels {
			l |= r[w]
		}
		peers, open := t.anyPeer[w]|n&l, t.anyPort[w]
		if inBlock != nil {
			peers |= inBlock[w]
		}
		for _, r := range ports {
			open |= r[w]
		}
		if hit := peers & open; hit != 0 {
			return t.refs[w*64+bits.TrailingZeros64(hit)], true
		}
	}
	return RuleRef{}, false
}

// matchPorts appends to found the sets of rows that admit the port by number or
// by one of the destination's names for it.
func (t *Table) matchPorts(proto Protocol, port uint16, names []NamedPort, found []rows) []rows {
	slot := portSlot(proto)
	if slot < 0 {
		return found
	}
	if r := t.ports[slot].lookup(port); r != nil {
		found = append(found, r)
	}
	if t.names == nil {
		return found
	}
	for _, n := range names {
		if n.Port == port && n.Proto == proto {
			if r := t.names[PortName{proto, n.Name}]; r != nil {
				found = append(found, r)
			}
		}
	}
	return found
}
