package verdict

import "math/bits"

// wideTable is a table of any number of rows: bitmaps of many words, a trie for
// blocks, and classes for many selectors.
type wideTable struct {
	words     int
	anyPeer   rows // rows without a peer test
	anyPort   rows // rows without a port test
	namespace axis
	labels    axis
	ports     [3]portIndex
	blocks    blockTrie
	names     map[PortName]rows // nil when no rule has a name
}

func newWideTable(rules []Rule, rowsOf [][]int, rowCount int, namespaceBits, podBits []Bits) *wideTable {
	t := &wideTable{words: (rowCount + 63) / 64}
	t.buildPeers(rules, rowsOf, rowCount, namespaceBits, podBits)
	t.buildPorts(rules, rowsOf)
	t.pack()
	return t
}

// pack moves all that a decision reads of the table, but for the trie and the
// names, into one piece of memory.
func (t *wideTable) pack() {
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

func (t *wideTable) buildPeers(rules []Rule, rowsOf [][]int, rowCount int, namespaceBits, podBits []Bits) {
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
	t.blocks = buildBlocks(blocks, blockRow, t.words, rowCount)
}

func (t *wideTable) buildPorts(rules []Rule, rowsOf [][]int) {
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

// admit finds the first row that admits a flow; see Table.admit.
func (t *wideTable) admit(s *Snapshot, subject, peer *end, key *addrKey, f *Flow, dst *end) uint32 {
	var namespaceBuf, labelBuf, portBuf [scanLimit + 1]rows
	var names []NamedPort
	if t.names != nil && dst.endpoint != nil {
		names = dst.endpoint.Ports
	}
	ports := t.matchPorts(f.Proto, f.DstPort, names, portBuf[:0])
	inNamespace, withLabels := namespaceBuf[:0], labelBuf[:0]
	if peer.endpoint != nil {
		inNamespace = t.namespace.match(s.namespaceBits, peer.namespace, peer.namespace == subject.namespace, inNamespace)
		if len(inNamespace) > 0 {
			withLabels = t.labels.match(s.podBits, peer.labels, false, withLabels)
		}
	}
	inBlock := t.blocks.lookup(key.addr())
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
			return uint32(w*64 + bits.TrailingZeros64(hit) + 1)
		}
	}
	return 0
}

// matchPorts appends to found the sets of rows that admit the port by number or
// by one of the destination's names for it.
func (t *wideTable) matchPorts(proto Protocol, port uint16, names []NamedPort, found []rows) []rows {
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
