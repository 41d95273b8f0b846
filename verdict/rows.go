package verdict

// rows is a set of a table's rows, one bit each, as long as the table has
// words. A row is one way to be admitted: one peer test of one rule together
// with the rule's ports. Intersecting the rows whose peer test holds with the
// rows whose port test holds leaves those that admit the flow; the lowest is
// the first rule in order of policy name and rule index.
//
// This is the bit-vector scheme of packet classification (Lakshman and
// Stiliadis, SIGCOMM 1998): a lookup per dimension, then 64 rules per
// instruction.
type rows []uint64

func newRows(words int) rows { return make(rows, words) }

func (r rows) set(row int)   { r[row>>6] |= 1 << (row & 63) }
func (r rows) clear(row int) { r[row>>6] &^= 1 << (row & 63) }

func (r rows) clone() rows { return append(rows(nil), r...) }

func (r rows) or(o rows) {
	for i, w := range o {
		r[i] |= w
	}
}

func (r rows) equal(o rows) bool {
	for i, w := range o {
		if r[i] != w {
			return false
		}
	}
	return true
}

// rowSets is a list of sets of rows of one table, one behind the other in
// memory: a decision waits for memory more than for anything else, and
// neighbours come together.
type rowSets struct {
	words int
	bits  []uint64
}

// add appends a copy of a set.
func (s *rowSets) add(r rows) { s.bits = append(s.bits, r...) }

// at gives the i-th set, which belongs to the list.
func (s *rowSets) at(i int) rows { return s.bits[i*s.words : (i+1)*s.words] }

// moveTo moves the list to the end of an arena that is large enough.
func (s *rowSets) moveTo(arena *[]uint64) {
	start := len(*arena)
	*arena = append(*arena, s.bits...)
	s.bits = (*arena)[start:len(*arena):len(*arena)]
}

// Bits is a growable bitmap: which of a numbered set of things (namespaces, or
// sets of pod labels) a selector matches. Reading beyond its end gives false.
type Bits []uint64

// Set sets bit i, growing the map as needed.
func (b *Bits) Set(i uint32) {
	for int(i>>6) >= len(*b) {
		*b = append(*b, 0)
	}
	(*b)[i>>6] |= 1 << (i & 63)
}

// Has tells whether bit i is set.
func (b Bits) Has(i uint32) bool {
	return int(i>>6) < len(b) && b[i>>6]&(1<<(i&63)) != 0
}

// Clear clears bit i.
func (b Bits) Clear(i uint32) {
	if int(i>>6) < len(b) {
		b[i>>6] &^= 1 << (i & 63)
	}
}
