package verdict

import "math/bits"

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

func (r rows) set(row int)      { r[row>>6] |= 1 << (row & 63) }
func (r rows) clear(row int)    { r[row>>6] &^= 1 << (row & 63) }
func (r rows) has(row int) bool { return r[row>>6]&(1<<(row&63)) != 0 }

func (r rows) clone() rows { return append(rows(nil), r...) }

func (r rows) or(o rows) {
	for i, w := range o {
		r[i] |= w
	}
}

func (r rows) empty() bool {
	for _, w := range r {
		if w != 0 {
			return false
		}
	}
	return true
}

func (r rows) equal(o rows) bool {
	for i, w := range o {
		if r[i] != w {
			return false
		}
	}
	return true
}

func (r rows) count() (n int) {
	for _, w := range r {
		n += bits.OnesCount64(w)
	}
	return n
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
