package verdict

import (
	"hash/maphash"
	"maps"
)

// Matches keeps one copy of what tables have alike but for the names of their
// policies, as those of namespaces that are made from one template do. What is
// there once is what the processor's caches still hold from another pod's decision.
// Wide tables aren't shared. It belongs to one goroutine.
type Matches struct {
	byHash map[uint64]*sharedMatch
}

type sharedMatch struct {
	*match
	users int
}

// Share gives the table the copy that is there already, or keeps the table's own
// for others. The table must not be in use yet, and is to be dropped when it isn't
// any more.
func (x *Matches) Share(t *Table) {
	if t.match.rare&rareWide != 0 {
		return
	}
	hash := t.match.hash()
	s := x.byHash[hash]
	if s == nil {
		if x.byHash == nil {
			x.byHash = map[uint64]*sharedMatch{}
		}
		s = &sharedMatch{match: t.match}
		x.byHash[hash] = s
	} else if !s.equal(t.match) {
		return // of one hash by chance
	}
	s.users++
	t.match = s.match
}

// Drop says that a table that was shared is needed no more.
func (x *Matches) Drop(t *Table) {
	if t.match.rare&rareWide != 0 {
		return
	}
	hash := t.match.hash()
	s := x.byHash[hash]
	if s == nil || s.match != t.match {
		return
	}
	if s.users--; s.users == 0 {
		delete(x.byHash, hash)
	}
}

// Len is how many copies there are.
func (x *Matches) Len() int { return len(x.byHash) }

var matchSeed = maphash.MakeSeed()

// hash is equal for equal narrow matches.
func (m *match) hash() uint64 {
	first := *m
	first.more = nil
	hash := maphash.Comparable(matchSeed, first)
	if m.more != nil {
		hash += maphash.Comparable(matchSeed, m.more.blocks6)
		for name, rows := range m.more.names {
			hash += maphash.Comparable(matchSeed, name) * (2*uint64(rows) + 1) // in any order
		}
	}
	return hash
}

// equal compares narrow matches.
func (m *match) equal(other *match) bool {
	a, b := *m, *other
	a.more, b.more = nil, nil
	if a != b || (m.more == nil) != (other.more == nil) {
		return false
	}
	return m.more == nil || m.more.blocks6 == other.more.blocks6 && maps.Equal(m.more.names, other.more.names)
}
