package policycache

import (
	"hash/maphash"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"portcullis/verdict"
)

// matcher numbers distinct label sets and distinct selectors, and knows which
// selector matches which set. Both come and go, one by one, at the cost of what
// they match: a set asks only selectors that name one of its labels, or name
// none, and a selector only sets that have a label which it names. A number is
// given anew when nobody needs what had it.
type matcher struct {
	sets      numbered[labelSet]
	selectors numbered[labels.Selector]
	// bits hold, by SelectorID, the sets that a selector matches.
	bits bitmaps
	// by what they have, or demand, both find each other
	setsBy, selectorsBy index
}

// labelSet is a distinct set of labels.
type labelSet struct {
	labels.Set
	hash uint64
}

func newMatcher() *matcher {
	return &matcher{
		sets:        numbered[labelSet]{ids: map[string]uint32{}},
		selectors:   numbered[labels.Selector]{ids: map[string]uint32{}},
		setsBy:      index{},
		selectorsBy: index{},
	}
}

var labelSeed = maphash.MakeSeed()

// addSet gives the number of a label set, which the caller has to drop some
// time. The set must not change.
func (m *matcher) addSet(set map[string]string) uint32 {
	text := labelText(set)
	id, isNew := m.sets.add(text)
	if !isNew {
		return id
	}
	m.sets.all[id].value = labelSet{set, maphash.String(labelSeed, text)}
	for key, value := range set {
		m.setsBy.add(label{key: key}, id)
		m.setsBy.add(label{key, value, true}, id)
	}
	m.selectorsFor(set, func(s uint32) { m.bits.write(s).Set(id) })
	return id
}

// dropSet says that one of those who added the set needs it no more.
func (m *matcher) dropSet(id uint32) {
	set := m.sets.all[id].value
	if !m.sets.drop(id) {
		return
	}
	for key, value := range set.Set {
		m.setsBy.remove(label{key: key}, id)
		m.setsBy.remove(label{key, value, true}, id)
	}
	m.selectorsFor(set.Set, func(s uint32) { m.bits.write(s).Clear(id) })
}

// selectorsFor calls yield with the selectors that match the set.
func (m *matcher) selectorsFor(set labels.Set, yield func(uint32)) {
	ask := func(l label) {
		for _, s := range m.selectorsBy[l] {
			if m.selectors.all[s].value.Matches(set) {
				yield(s)
			}
		}
	}
	ask(label{})
	for key, value := range set {
		ask(label{key: key})
		ask(label{key, value, true})
	}
}

// addSelector gives the number of a selector, which the caller has to drop some
// time.
func (m *matcher) addSelector(selector labels.Selector) verdict.SelectorID {
	id, isNew := m.selectors.add(selector.String()) // sorted, so equal selectors have equal texts
	if !isNew {
		return verdict.SelectorID(id)
	}
	m.selectors.all[id].value = selector
	matched := m.bits.write(id)
	demands := demandsOf(selector)
	for _, l := range demands {
		m.selectorsBy.add(l, id)
	}
	if demands[0] == (label{}) {
		for set := range m.sets.all {
			if s := &m.sets.all[set]; s.users > 0 && selector.Matches(s.value.Set) {
				matched.Set(uint32(set))
			}
		}
		return verdict.SelectorID(id)
	}
	for _, l := range demands {
		for _, set := range m.setsBy[l] {
			if selector.Matches(m.sets.all[set].value.Set) {
				matched.Set(set)
			}
		}
	}
	return verdict.SelectorID(id)
}

// dropSelector says that one of those who added the selector needs it no more.
func (m *matcher) dropSelector(s verdict.SelectorID) {
	id := uint32(s)
	selector := m.selectors.all[id].value
	if !m.selectors.drop(id) {
		return
	}
	for _, l := range demandsOf(selector) {
		m.selectorsBy.remove(l, id)
	}
	*m.bits.write(id) = nil
}

// matches tells whether a selector matches a label set.
func (m *matcher) matches(s verdict.SelectorID, set uint32) bool { return m.bits.maps[s].Has(set) }

// label is a label's key and value, or with exact unset its key alone. The zero
// label is what every set has.
type label struct {
	key, value string
	exact      bool
}

// demandsOf gives labels of which every set that the selector matches has one.
// A selector that demands nothing demands the zero label.
func demandsOf(selector labels.Selector) []label {
	requirements, _ := selector.Requirements()
	found := []label{{}}
	for _, r := range requirements {
		switch r.Operator() {
		case selection.Equals, selection.In:
			var exact []label
			for value := range r.Values() {
				exact = append(exact, label{r.Key(), value, true})
			}
			return exact
		case selection.Exists:
			found = []label{{key: r.Key()}}
		}
	}
	return found
}

// index lists what has, or demands, a label.
type index map[label][]uint32

func (x index) add(l label, id uint32) { x[l] = append(x[l], id) }

func (x index) remove(l label, id uint32) {
	list := x[l]
	at := slices.Index(list, id)
	list[at] = list[len(list)-1]
	if list = list[:len(list)-1]; len(list) == 0 {
		delete(x, l)
		return
	}
	x[l] = list
}

// numbered gives things numbers by their texts, and counts who needs each.
type numbered[T any] struct {
	ids  map[string]uint32
	all  []numberedThing[T]
	free []uint32
}

type numberedThing[T any] struct {
	text  string
	users int
	value T
}

// add gives the number of a thing, and tells whether it is a new one.
func (n *numbered[T]) add(text string) (id uint32, isNew bool) {
	if id, ok := n.ids[text]; ok {
		n.all[id].users++
		return id, false
	}
	if last := len(n.free) - 1; last >= 0 {
		id, n.free = n.free[last], n.free[:last]
	} else {
		id = uint32(len(n.all))
		n.all = append(n.all, numberedThing[T]{})
	}
	n.ids[text] = id
	n.all[id] = numberedThing[T]{text: text, users: 1}
	return id, true
}

// drop takes one user away, and tells whether it was the last one.
func (n *numbered[T]) drop(id uint32) bool {
	thing := &n.all[id]
	if thing.users--; thing.users > 0 {
		return false
	}
	delete(n.ids, thing.text)
	*thing = numberedThing[T]{}
	n.free = append(n.free, id)
	return true
}

// bitmaps are bitmaps that snapshots share as long as they don't change.
type bitmaps struct {
	maps   []verdict.Bits
	shared bool // the list itself is some snapshot's
	own    map[uint32]bool
}

// write gives a bitmap to write to.
func (b *bitmaps) write(id uint32) *verdict.Bits {
	if b.shared {
		b.maps, b.shared = slices.Clone(b.maps), false
	}
	for int(id) >= len(b.maps) {
		b.maps = append(b.maps, nil)
	}
	if !b.own[id] {
		if b.own == nil {
			b.own = map[uint32]bool{}
		}
		b.own[id] = true
		b.maps[id] = slices.Clone(b.maps[id])
	}
	return &b.maps[id]
}

// share gives the bitmaps to a snapshot: what is written from now on is copied
// first. changed are those that were written since the last time.
func (b *bitmaps) share() (maps []verdict.Bits, changed map[uint32]bool) {
	changed = b.own
	b.shared, b.own = true, nil
	return b.maps, changed
}
