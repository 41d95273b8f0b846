package verdict

import (
	"math"
	"slices"
)

// SelectorID numbers a distinct selector within one snapshot: its bitmap in
// Input.NamespaceBits or Input.PodBits.
type SelectorID uint32

// SameNamespace stands where a peer has no namespace selector: it matches the
// namespace of the pod that the table isolates. So the tables of namespaces whose
// policies are alike are alike, and no bitmap is read.
const SameNamespace SelectorID = math.MaxUint32

// scanLimit is the number of distinct selectors up to which an axis tests them
// one by one. Most tables have fewer; testing one is a single load, so this
// many cost about as much as one miss in the processor's cache, and such a
// table needs no memory per namespace or label set.
const scanLimit = 8

// axis answers, for one dimension of a peer's identity (its namespace or its
// labels), which rows of a table it satisfies. Its size depends on the
// table's own selectors only, not on the pods they match, unless there are
// more than scanLimit of them.
type axis struct {
	// selectors and their rows, when there are at most scanLimit.
	selectors []SelectorID
	rows      rowSets
	// classOf gives for each namespace or label set its class, and classRows
	// the rows of each class, when there are more. Indexes that match the
	// same selectors share a class; class 0 matches none.
	classOf   []uint32
	classRows rowSets
	// same are the rows of SameNamespace, nil for none.
	same rows
}

// axisBuilder collects which rows need which selector.
type axisBuilder struct {
	words int
	need  map[SelectorID]rows
}

func newAxisBuilder(words int) *axisBuilder {
	return &axisBuilder{words: words, need: map[SelectorID]rows{}}
}

func (b *axisBuilder) add(s SelectorID, row int) {
	r, ok := b.need[s]
	if !ok {
		r = newRows(b.words)
		b.need[s] = r
	}
	r.set(row)
}

// build makes the axis. bits holds each selector's bitmap and is read for
// tables of many selectors only.
func (b *axisBuilder) build(bits []Bits) axis {
	a := axis{rows: rowSets{words: b.words}, classRows: rowSets{words: b.words}, same: b.need[SameNamespace]}
	delete(b.need, SameNamespace)
	for s := range b.need {
		a.selectors = append(a.selectors, s)
	}
	slices.Sort(a.selectors)
	for _, s := range a.selectors {
		a.rows.add(b.need[s])
	}
	if len(a.selectors) > scanLimit {
		a.classify(bits, b.words)
	}
	return a
}

// classify replaces the scan by one class per index. Equal classes are shared,
// found by refining one selector at a time: a class and whether this selector
// matches give the next class, so the cost is the bits that are set.
func (a *axis) classify(bits []Bits, words int) {
	size := 0
	for _, s := range a.selectors {
		size = max(size, len(bits[s])*64)
	}
	a.classOf = make([]uint32, size)
	classes := []rows{newRows(words)}
	for i, s := range a.selectors {
		refined := map[uint32]uint32{}
		for index := range uint32(len(bits[s]) * 64) {
			if !bits[s].Has(index) {
				continue
			}
			old := a.classOf[index]
			next, ok := refined[old]
			if !ok {
				next = uint32(len(classes))
				refined[old] = next
				with := classes[old].clone()
				with.or(a.rows.at(i))
				classes = append(classes, with)
			}
			a.classOf[index] = next
		}
	}
	a.compact(classes)
	a.selectors, a.rows.bits = nil, nil
}

// compact keeps the classes that some index still has.
func (a *axis) compact(classes []rows) {
	kept := map[uint32]uint32{0: 0}
	a.classRows.add(classes[0])
	for i, class := range a.classOf {
		id, ok := kept[class]
		if !ok {
			id = uint32(len(kept))
			kept[class] = id
			a.classRows.add(classes[class])
		}
		a.classOf[i] = id
	}
}

// scans tells whether the axis depends on no bitmap beyond those it reads at
// lookup, so that it stays right when bitmaps change.
func (a *axis) scans() bool { return a.classOf == nil }

// match appends to found the sets of rows whose union index satisfies; same is
// whether it is that of the table's own pod. found should have room for scanLimit
// and one more.
func (a *axis) match(bits []Bits, index uint32, same bool, found []rows) []rows {
	if same && a.same != nil {
		found = append(found, a.same)
	}
	if a.classOf != nil {
		if int(index) < len(a.classOf) {
			found = append(found, a.classRows.at(int(a.classOf[index])))
		}
		return found
	}
	for i, s := range a.selectors {
		if bits[s].Has(index) {
			found = append(found, a.rows.at(i))
		}
	}
	return found
}
