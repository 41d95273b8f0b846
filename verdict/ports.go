package verdict

import (
	"cmp"
	"slices"
)

// PortRange is a rule's ports First to Last, both included, of one protocol.
type PortRange struct {
	Proto       Protocol
	First, Last uint16
}

// PortName is a rule's named port, to be resolved at the connection's
// destination.
type PortName struct {
	Proto Protocol
	Name  string
}

// portIndex maps the ports of one protocol to the rows that admit them: the i-th
// set holds from starts[i] up to the port before starts[i+1]. It is empty when no
// row names the protocol.
type portIndex struct {
	starts []uint16
	rows   rowSets
}

// lookup gives the rows that admit the port, nil for none.
func (p *portIndex) lookup(port uint16) rows {
	lo, hi := 0, len(p.starts)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if p.starts[mid] <= port {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return nil
	}
	return p.rows.at(lo - 1)
}

// portEdge opens or closes, at a port, one rule's rows.
type portEdge struct {
	port  int
	delta int
	rule  int
}

// buildPorts sweeps over the edges of all rules' ranges of one protocol and
// notes the open rows after each edge. rowsOf lists each rule's rows. A rule's
// ranges may overlap: it stays open until the last of them ends.
func buildPorts(proto Protocol, rules []Rule, rowsOf [][]int, words int) portIndex {
	var edges []portEdge
	for i := range rules {
		for _, r := range rules[i].Ports {
			if r.Proto == proto {
				edges = append(edges, portEdge{int(r.First), 1, i}, portEdge{int(r.Last) + 1, -1, i})
			}
		}
	}
	if len(edges) == 0 {
		return portIndex{}
	}
	slices.SortFunc(edges, func(a, b portEdge) int { return cmp.Compare(a.port, b.port) })
	index := portIndex{starts: []uint16{0}, rows: rowSets{words, newRows(words)}}
	open, current := make([]int, len(rules)), newRows(words)
	for i := 0; i < len(edges); {
		port := edges[i].port
		for ; i < len(edges) && edges[i].port == port; i++ {
			e := edges[i]
			open[e.rule] += e.delta
			for _, row := range rowsOf[e.rule] {
				if open[e.rule] > 0 {
					current.set(row)
				} else {
					current.clear(row)
				}
			}
		}
		index.note(port, current)
	}
	return index
}

// note records that from port on the open rows are current.
func (p *portIndex) note(port int, current rows) {
	last := len(p.starts) - 1
	switch {
	case port > 65535 || p.rows.at(last).equal(current):
	case port == int(p.starts[last]):
		copy(p.rows.at(last), current)
	default:
		p.starts = append(p.starts, uint16(port))
		p.rows.add(current)
	}
}

// portSlot numbers the protocols that have ports, -1 for the others.
func portSlot(p Protocol) int {
	switch p {
	case TCP:
		return 0
	case UDP:
		return 1
	case SCTP:
		return 2
	}
	return -1
}
