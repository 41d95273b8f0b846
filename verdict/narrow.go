package verdict

import (
	"math"
	"math/bits"
	"net/netip"
	"slices"
)

// What fits a narrow table: its rows, and its intervals of ports and, in each
// family, of addresses.
const (
	narrowRows   = 16
	narrowPorts  = 8
	narrowBlocks = 10
)

// portKey joins a protocol and a port to one number.
func portKey(proto Protocol, port uint16) uint32 { return uint32(proto)<<16 | uint32(port) }

// buildNarrow compiles the rules into the table itself, and tells whether they
// fit.
func (t *Table) buildNarrow(rules []Rule, rowsOf [][]int, rowCount int) bool {
	if rowCount > narrowRows {
		return false
	}
	blocks := map[int][]Block{}
	for i, r := range rules {
		rows := rowsOf[i]
		for _, row := range rows {
			t.addNarrowPorts(&r, 1<<row)
		}
		if r.AnyPeer {
			t.anyPeer |= 1 << rows[0]
			continue
		}
		if len(r.Blocks) > 0 {
			t.byBlock |= 1 << rows[0]
			blocks[rows[0]] = r.Blocks
			rows = rows[1:]
		}
		for j, s := range r.Selectors {
			t.peers[rows[j]] = s
		}
	}
	return t.buildNarrowPorts(rules, rowsOf) && t.buildNarrowBlocks(blocks)
}

// addNarrowPorts notes a row without a port test, and one of named ports.
func (t *Table) addNarrowPorts(r *Rule, row uint16) {
	if r.AnyPort {
		t.anyPort |= row
	}
	for _, n := range r.Names {
		if t.names == nil {
			t.names = map[PortName]uint16{}
		}
		t.names[n] |= row
	}
}

func (t *Table) buildNarrowPorts(rules []Rule, rowsOf [][]int) bool {
	for i := range t.portStarts {
		t.portStarts[i] = math.MaxUint32 // above all ports
	}
	count := 0
	add := func(start uint32, rows uint16) {
		if rows == t.portRows[min(count, narrowPorts)] {
			return
		}
		if count++; count <= narrowPorts {
			t.portStarts[count-1], t.portRows[count] = start, rows
		}
	}
	for _, proto := range []Protocol{TCP, UDP, SCTP} {
		index := buildPorts(proto, rules, rowsOf, 1)
		for i, start := range index.starts {
			add(portKey(proto, start), uint16(index.rows.at(i)[0]))
		}
		add(portKey(proto+1, 0), 0)
	}
	return count <= narrowPorts
}

func (t *Table) buildNarrowBlocks(blocks map[int][]Block) bool {
	if len(blocks) == 0 {
		return true
	}
	t.blocks = &narrowBlockIndex{}
	return t.blocks.build(blocks, false) && t.blocks.build(blocks, true)
}

// admitNarrow finds the first row that admits a flow between the table's pod and
// the peer, and tells whether there is one. open are the rows whose ports match;
// the others aren't looked at any further.
func (t *Table) admitNarrow(s *Snapshot, peer *end, key *addrKey, open uint16) (int, bool) {
	found := open & t.anyPeer
	if open&t.byBlock != 0 {
		found |= open & t.blocks.lookup(key)
	}
	if peer.endpoint != nil {
		// Only a row before the first one found can still matter.
		for todo := open &^ (t.byBlock | t.anyPeer) & (found&-found - 1); todo != 0; todo &= todo - 1 {
			row := bits.TrailingZeros16(todo)
			p := t.peers[row]
			if s.namespaceBits[p.Namespace].Has(peer.namespace) && s.podBits[p.Pod].Has(peer.labels) {
				return row, true
			}
		}
	}
	return bits.TrailingZeros16(found), found != 0
}

// openAt gives the rows that admit a port by its number.
func (t *Table) openAt(key uint32) uint16 {
	n := 0
	for n < narrowPorts && t.portStarts[n] <= key {
		n++
	}
	return t.portRows[n]
}

// named gives the rows that admit the flow's port by one of its names.
func (t *Table) named(f *Flow, names []NamedPort) uint16 {
	open := uint16(0)
	for _, n := range names {
		if n.Port == f.DstPort && n.Proto == f.Proto {
			open |= t.names[PortName{f.Proto, n.Name}]
		}
	}
	return open
}

// narrowBlockIndex finds the rows whose blocks hold an address: in each family
// the starts of stretches of addresses, with the rows of each. Those of IPv4
// come first and fill a cache line.
type narrowBlockIndex struct {
	count4, count6 uint8
	rows4          [narrowBlocks]uint16
	starts4        [narrowBlocks]uint32
	starts6        [narrowBlocks]addrKey
	rows6          [narrowBlocks]uint16
}

// lookup gives the rows of the stretch that the address lies in.
func (b *narrowBlockIndex) lookup(k *addrKey) uint16 {
	n := 0
	if !k.is4() {
		for i := range b.count6 % (narrowBlocks + 1) {
			if s := &b.starts6[i]; s.hi < k.hi || s.hi == k.hi && s.lo <= k.lo {
				n++
			}
		}
		if n == 0 {
			return 0
		}
		return b.rows6[n-1]
	}
	for i := range b.count4 % (narrowBlocks + 1) {
		if b.starts4[i] <= uint32(k.lo) {
			n++
		}
	}
	if n == 0 {
		return 0
	}
	return b.rows4[n-1]
}

// add appends a stretch, and tells whether it fits.
func (b *narrowBlockIndex) add(start netip.Addr, rows uint16) bool {
	k := keyOf(start)
	if start.Is6() && b.count6 < narrowBlocks {
		b.starts6[b.count6], b.rows6[b.count6] = k, rows
		b.count6++
		return true
	}
	if start.Is4() && b.count4 < narrowBlocks {
		b.starts4[b.count4], b.rows4[b.count4] = uint32(k.lo), rows
		b.count4++
		return true
	}
	return false
}

// build finds one family's stretches: at each address where a block or an
// exception begins or has just ended, it asks all blocks. It tells whether they
// fit.
func (b *narrowBlockIndex) build(blocks map[int][]Block, v6 bool) bool {
	var edges []netip.Addr
	for _, list := range blocks {
		for _, block := range list {
			for _, p := range append([]netip.Prefix{block.CIDR}, block.Except...) {
				if p.Addr().Is6() == v6 {
					edges = appendEdges(edges, p)
				}
			}
		}
	}
	slices.SortFunc(edges, netip.Addr.Compare)
	last := uint16(0)
	for _, a := range slices.Compact(edges) {
		rows := rowsOfBlocks(blocks, a)
		if rows == last {
			continue
		}
		if !b.add(a, rows) {
			return false
		}
		last = rows
	}
	return true
}

// appendEdges appends a prefix's first address and the one after its last, if
// there is one.
func appendEdges(edges []netip.Addr, p netip.Prefix) []netip.Addr {
	edges = append(edges, p.Addr())
	last, host := keyOf(p.Addr()), p.Addr().BitLen()-p.Bits()
	last.hi |= 1<<max(host-64, 0) - 1
	last.lo |= 1<<min(host, 64) - 1
	if after := last.addr().Next(); after.IsValid() {
		edges = append(edges, after)
	}
	return edges
}

// rowsOfBlocks asks every block whether it holds the address.
func rowsOfBlocks(blocks map[int][]Block, a netip.Addr) uint16 {
	rows := uint16(0)
	for row, list := range blocks {
		if slices.ContainsFunc(list, func(b Block) bool {
			return b.CIDR.Contains(a) && !slices.ContainsFunc(b.Except, func(e netip.Prefix) bool { return e.Contains(a) })
		}) {
			rows |= 1 << row
		}
	}
	return rows
}
