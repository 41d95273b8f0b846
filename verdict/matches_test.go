package verdict

import (
	"math"
	"math/rand/v2"
	"testing"
	"unsafe"
)

// TestMatchesAreShared: tables of policies that differ in their names alone have one
// match, and keep their names; all else makes another one.
func TestMatchesAreShared(t *testing.T) {
	rule := Rule{Selectors: []PeerSelector{{SameNamespace, 0}}, Ports: []PortRange{{TCP, 80, 80}}}
	other := func(change func(*Rule)) []Rule { r := rule; change(&r); return []Rule{r} }
	block := func(cidr string) []Block { return []Block{{CIDR: prefix(cidr)}} }
	var matches Matches
	for _, row := range []struct {
		name  string
		rules []Rule
		count int // of matches, then
	}{
		{"a/p", []Rule{rule}, 1},
		{"b/p", []Rule{rule}, 1},
		{"another port", other(func(r *Rule) { r.Ports = []PortRange{{TCP, 81, 81}} }), 2},
		{"another peer", other(func(r *Rule) { r.Selectors = []PeerSelector{{0, 0}} }), 3},
		{"a name", other(func(r *Rule) { r.Names = []PortName{{TCP, "web"}} }), 4},
		{"the same name", other(func(r *Rule) { r.Names = []PortName{{TCP, "web"}} }), 4},
		{"another name", other(func(r *Rule) { r.Names = []PortName{{TCP, "www"}} }), 5},
		{"a block", other(func(r *Rule) { r.Blocks = block("10.0.0.0/8") }), 6},
		{"a block of IPv6", other(func(r *Rule) { r.Blocks = block("fd00::/8") }), 7},
		{"another of IPv6", other(func(r *Rule) { r.Blocks = block("fd00::/9") }), 8},
		{"the same of IPv6", other(func(r *Rule) { r.Blocks = block("fd00::/9") }), 8},
	} {
		table := NewTable([]Policy{{row.name, row.rules}}, nil, nil)
		matches.Share(table)
		if matches.Len() != row.count || table.Policies()[0] != row.name || table.refs[0].Policy != row.name {
			t.Errorf("%s: %d matches, want %d", row.name, matches.Len(), row.count)
		}
	}
}

// TestMatchesGoWithTheirTables adds and drops random tables: what is shared is
// there as long as some table has it, and admits what its own match admitted.
func TestMatchesGoWithTheirTables(t *testing.T) {
	var matches Matches
	var tables []*Table
	r := rand.New(rand.NewPCG(7, 8))
	for range 2000 {
		if len(tables) > 0 && r.IntN(3) == 0 {
			i := r.IntN(len(tables))
			matches.Drop(tables[i])
			tables = append(tables[:i], tables[i+1:]...)
			continue
		}
		w := randomWorld(rand.New(rand.NewPCG(r.Uint64N(40), 1)), 20, 6)
		table := NewTable(w.policies, w.nsBits, w.pod)
		own := table.match
		matches.Share(table)
		if own.rare&rareWide == 0 && !own.equal(table.match) {
			t.Fatal("a table was given a match that isn't its own")
		}
		tables = append(tables, table)
	}
	distinct := map[*match]bool{}
	for _, table := range tables {
		if table.match.rare&rareWide == 0 {
			distinct[table.match] = true
		}
	}
	if len(distinct) != matches.Len() || len(distinct) == 0 {
		t.Errorf("%d tables have %d matches, and %d are kept", len(tables), len(distinct), matches.Len())
	}
	for _, table := range tables {
		matches.Drop(table)
	}
	if matches.Len() != 0 {
		t.Errorf("%d matches are left of no table", matches.Len())
	}
}

// TestSelectorsBeyondShortNumbers: a table whose selectors have numbers that a
// narrow one can't write admits the same.
func TestSelectorsBeyondShortNumbers(t *testing.T) {
	yes := Bits{1}
	bits := make([]Bits, math.MaxUint16+3)
	for _, c := range []struct {
		id   SelectorID
		wide bool
	}{{0, false}, {math.MaxUint16 - 1, false}, {math.MaxUint16, true}, {math.MaxUint16 + 1, true}, {math.MaxUint16 + 2, true}, {SameNamespace, false}} {
		if c.id != SameNamespace {
			bits[c.id] = yes
		}
		table := NewTable([]Policy{{"a/p", []Rule{{AnyPort: true, Selectors: []PeerSelector{{c.id, 0}}}}}}, bits, []Bits{yes})
		if got := table.match.rare&rareWide != 0; got != c.wide {
			t.Errorf("selector %d: wide %t", c.id, got)
		}
		in := Input{Generation: 1, NamespaceBits: bits, PodBits: []Bits{yes}, Owners: nil}
		s := NewSnapshot(in, nil)
		for namespace, want := range []bool{true, false} {
			subject, peer := newEnd(keyOf(web), &Endpoint{}, nil), newEnd(keyOf(db), &Endpoint{NamespaceIndex: uint32(namespace)}, nil)
			f := tcp(db, web, 80)
			if got := table.match.admit(s, &subject, &peer, &peer.addrKey, f, table.match.open(f, &nobody), &nobody) != 0; got != want {
				t.Errorf("selector %d, namespace %d: admitted %t", c.id, namespace, got)
			}
		}
		if c.id != SameNamespace {
			bits[c.id] = nil
		}
	}
}

// TestLinesOfADecision: what a decision reads is where its comments say, so that no
// field that is added moves the others over a cache line's edge unseen.
func TestLinesOfADecision(t *testing.T) {
	const line = 64
	var m match
	for _, c := range []struct {
		what      string
		got, want uintptr
	}{
		{"an end", unsafe.Sizeof(end{}), line},
		{"a match", unsafe.Sizeof(m), 3 * line},
		{"the second line of a match", unsafe.Offsetof(m.peers), line},
		{"the third line of a match", unsafe.Offsetof(m.blocks4), 2 * line},
		{"a set of the cache", unsafe.Sizeof(cacheSet{}), line},
		{"an entry of the cache", unsafe.Sizeof(flowEntry{}), 2 * line},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d, want %d", c.what, c.got, c.want)
		}
	}
	for range 100 {
		if at := uintptr(unsafe.Pointer(newNarrow(nil, nil, 0))); at%line != 0 {
			t.Fatalf("a match begins %d bytes behind a line's edge", at%line)
		}
	}
}
