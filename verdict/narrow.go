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
	narrowRows   = 15
	narrowPorts  = 8
	narrowBlocks = 10
)

// narrowPeer is a PeerSelector in short. Where a cluster has more selectors than
// that, some tables are wide.
type narrowPeer struct{ namespace, pod uint16 }

// narrowSame is SameNamespace in short.
const narrowSame = math.MaxUint16

// newNarrowPeer tells whether the selector can be written in short.
func newNarrowPeer(s PeerSelector) (p narrowPeer, ok bool) {
	p = narrowPeer{uint16(s.Namespace), uint16(s.Pod)}
	return p, s.Pod <= math.MaxUint16 && (s.Namespace < narrowSame || s.Namespace == SameNamespace)
}

// portKey joins a protocol and a port to one number, of less than 31 bits.
func portKey(proto Protocol, port uint16) uint32 { return uint32(proto)<<16 | uint32(port) }

// newNarrow compiles the rules, and gives nil if they don't fit.
func newNarrow(rules []Rule, rowsOf [][]int, rowCount int) *match {
	m := new(match)
	if rowCount > narrowRows {
		return nil
	}
	blocks := map[int][]Block{}
	for i, r := range rules {
		rows := rowsOf[i]
		for _, row := range rows {
			m.addNarrowPorts(&r, 1<<row)
		}
		if r.AnyPeer {
			m.anyPeer |= 1 << rows[0]
			continue
		}
		if len(r.Blocks) > 0 {
			m.byBlock |= 1 << rows[0]
			blocks[rows[0]] = r.Blocks
			rows = rows[1:]
		}
		for j, s := range r.Selectors {
			var ok bool
			if m.peers[rows[j]], ok = newNarrowPeer(s); !ok {
				return nil
			}
		}
	}
	if !m.buildNarrowPorts(rules, rowsOf) || !m.buildNarrowBlocks(blocks) {
		return nil
	}
	return m
}

// addNarrowPorts notes a row without a port test, and one of named ports.
func (m *match) addNarrowPorts(r *Rule, row uint16) {
	if r.AnyPort {
		m.anyPort |= row
	}
	for _, n := range r.Names {
		more := m.rest()
		if more.names == nil {
			more.names = map[PortName]uint16{}
			m.rare |= rareNames
		}
		more.names[n] |= row
	}
}

func (m *match) buildNarrowPorts(rules []Rule, rowsOf [][]int) bool {
	starts := [narrowPorts]uint32{}
	for i := range starts {
		starts[i] = math.MaxInt32 // above all ports
	}
	count := 0
	add := func(start uint32, rows uint16) {
		if rows == m.portRows[min(count, narrowPorts)] {
			return
		}
		if count++; count <= narrowPorts {
			starts[count-1], m.portRows[count] = start, rows
		}
	}
	for _, proto := range []Protocol{TCP, UDP, SCTP} {
		index := buildPorts(proto, rules, rowsOf, 1)
		for i, start := range index.starts {
			add(portKey(proto, start), uint16(index.rows.at(i)[0]))
		}
		add(portKey(proto+1, 0), 0)
	}
	for i := range m.portStarts {
		m.portStarts[i] = uint64(starts[2*i]) | uint64(starts[2*i+1])<<32
	}
	return count <= narrowPorts
}

func (m *match) buildNarrowBlocks(blocks map[int][]Block) bool {
	if len(blocks) == 0 {
		return true
	}
	return sweepBlocks(blocks, false, m.blocks4.fill) && sweepBlocks(blocks, true, func(found []stretch) {
		if len(found) > 0 {
			m.rest().blocks6.fill(found)
		}
	})
}

// admitNarrow is admit for a narrow table. open are the rows whose ports match; the
// others aren't looked at any further.
//
// What a row says is a number that is added, not a way that is taken: of the ways
// that a flow decides, the processor guesses about half wrong, and each time it
// has waited for memory in vain.
func (m *match) admitNarrow(s *Snapshot, subject, peer *end, key *addrKey, open uint16) uint32 {
	found := open & m.anyPeer
	if open&m.byBlock != 0 {
		found |= open & m.inBlocks(key)
	}
	if peer.endpoint != nil {
		// Only a row before the first one found can still matter.
		for todo := open &^ (m.byBlock | m.anyPeer) & (found&-found - 1); todo != 0; todo &= todo - 1 {
			row := bits.TrailingZeros16(todo)
			p := m.peers[row]
			if inNamespace(s, subject, peer, p) && s.podBits[p.pod].Has(peer.labels) {
				return uint32(row + 1)
			}
		}
	}
	row := uint32(bits.TrailingZeros16(found)) // 16 for none
	return (row + 1) & (row>>4 - 1)
}

// inNamespace tells whether a peer is in a namespace that its row admits.
func inNamespace(s *Snapshot, subject, peer *end, p narrowPeer) bool {
	if p.namespace == narrowSame {
		return peer.namespace == subject.namespace
	}
	return s.namespaceBits[p.namespace].Has(peer.namespace)
}

// openAt gives the rows that admit a port by its number. It compares with two
// starts at once, of which neither has its highest bit set: where it is left set,
// the key isn't below the start.
func (m *match) openAt(key uint32) uint16 {
	const high = 1<<63 | 1<<31
	k := uint64(key)*(1<<32+1) | high
	s := &m.portStarts
	atOrAbove := (k-s[0])&high | (k-s[1])&high>>1 | (k-s[2])&high>>2 | (k-s[3])&high>>3
	return m.portRows[bits.OnesCount64(atOrAbove)]
}

// named gives the rows that admit the flow's port by one of its names.
func (m *match) named(f *Flow, names []NamedPort) uint16 {
	open := uint16(0)
	for _, n := range names {
		if n.Port == f.DstPort && n.Proto == f.Proto {
			open |= m.more.names[PortName{f.Proto, n.Name}]
		}
	}
	return open
}

// narrowBlocks4 finds the rows whose blocks hold an IPv4 address: the starts of
// stretches of addresses, and one place behind a start the rows of its stretch.
// Starts that aren't needed are the highest address, and their rows those of the
// last stretch.
type narrowBlocks4 struct {
	rows   [narrowBlocks + 1]uint16
	starts [narrowBlocks]uint32
}

// narrowBlocks6 is the same for IPv6.
type narrowBlocks6 struct {
	starts [narrowBlocks]addrKey
	rows   [narrowBlocks + 1]uint16
}

// inBlocks gives the rows whose blocks hold the address. It compares with all
// starts, and adds up what subtracting leaves: of a loop that ends where the
// address says so, the processor guesses the end, and wrong.
func (m *match) inBlocks(k *addrKey) uint16 {
	n := uint64(0)
	if k.is4() {
		a := uint64(uint32(k.lo))
		for _, start := range m.blocks4.starts {
			n += (uint64(start) - a - 1) >> 63
		}
		return m.blocks4.rows[n]
	}
	if m.more == nil {
		return 0
	}
	b := &m.more.blocks6
	for i := range b.starts {
		start := &b.starts[i]
		_, below := bits.Sub64(k.lo, start.lo, 0)
		_, below = bits.Sub64(k.hi, start.hi, below)
		n += 1 - below
	}
	return b.rows[n]
}

// stretch is where blocks begin to hold addresses of other rows than before.
type stretch struct {
	start netip.Addr
	rows  uint16
}

func (b *narrowBlocks4) fill(stretches []stretch) {
	for i := range b.starts {
		b.starts[i], b.rows[i+1] = math.MaxUint32, b.rows[i]
		if i < len(stretches) {
			k := keyOf(stretches[i].start)
			b.starts[i], b.rows[i+1] = uint32(k.lo), stretches[i].rows
		}
	}
}

func (b *narrowBlocks6) fill(stretches []stretch) {
	for i := range b.starts {
		b.starts[i], b.rows[i+1] = addrKey{math.MaxUint64, math.MaxUint64}, b.rows[i]
		if i < len(stretches) {
			b.starts[i], b.rows[i+1] = keyOf(stretches[i].start), stretches[i].rows
		}
	}
}

// sweepBlocks finds one family's stretches: at each address where a block or an
// exception begins or has just ended, it asks all blocks. It calls fill with them
// and tells whether they fit.
func sweepBlocks(blocks map[int][]Block, v6 bool, fill func([]stretch)) bool {
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
	var found []stretch
	last := uint16(0)
	for _, a := range slices.Compact(edges) {
		if rows := rowsOfBlocks(blocks, a); rows != last {
			found, last = append(found, stretch{a, rows}), rows
		}
	}
	if len(found) > narrowBlocks {
		return false
	}
	fill(found)
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
