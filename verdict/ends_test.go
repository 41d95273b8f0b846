package verdict

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"unsafe"
)

// TestSnapshotsAgainstMaps lets addresses come, go and change hands over a
// thousand snapshots, and compares each, and an older one, with plain maps.
func TestSnapshotsAgainstMaps(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	owners, nodes := map[netip.Addr]*Endpoint{}, map[netip.Addr][]string{}
	s := NewSnapshot(Input{Generation: 1}, nil)
	old, oldOwners, oldNodes := s, maps.Clone(owners), maps.Clone(nodes)
	table := NewTable(nil, nil, nil)
	for step := range uint64(1000) {
		// The cluster grows to some thousands of addresses, and shrinks again.
		if step%3 == 0 {
			s.IsolatedAddrs() // so that lists are made anew, and from others
		}
		size := int(4000 - 4*max(step, 1000-step))
		c := Change{Generation: step + 2, Owners: map[netip.Addr]*Endpoint{}, Nodes: map[netip.Addr][]string{}}
		for range 20 {
			a := randomAddr(r, size+10)
			c.Owners[a] = nil
			if r.IntN(3) > 0 {
				c.Owners[a] = &Endpoint{Meaning: r.Uint64(), Judged: r.IntN(2) == 0, Ingress: []*Table{nil, table}[r.IntN(2)]}
			}
			a = randomAddr(r, size+10)
			c.Nodes[a] = [][]string{nil, {"n1"}, {"n1", "n2"}}[r.IntN(3)]
		}
		update(owners, c.Owners, func(e *Endpoint) bool { return e == nil })
		update(nodes, c.Nodes, func(names []string) bool { return names == nil })
		s = s.Next(c)
		if step%50 == 0 {
			compareSnapshot(t, s, owners, nodes)
			compareSnapshot(t, old, oldOwners, oldNodes)
			old, oldOwners, oldNodes = s, maps.Clone(owners), maps.Clone(nodes)
		}
	}
}

func randomAddr(r *rand.Rand, size int) netip.Addr {
	i := r.IntN(size)
	if i%2 == 0 {
		return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
	}
	return netip.AddrFrom16([16]byte{0xfd, 7: byte(i), 15: byte(i >> 8)})
}

func update[V any](m, change map[netip.Addr]V, gone func(V) bool) {
	for a, v := range change {
		if gone(v) {
			delete(m, a)
		} else {
			m[a] = v
		}
	}
}

func compareSnapshot(t *testing.T, s *Snapshot, owners map[netip.Addr]*Endpoint, nodes map[netip.Addr][]string) {
	t.Helper()
	var isolated, judged []netip.Addr
	known := map[netip.Addr]bool{}
	for a, e := range owners {
		known[a] = true
		if e.Judged {
			judged = append(judged, a)
			if e.Isolated() {
				isolated = append(isolated, a)
			}
		}
	}
	for a := range nodes {
		known[a] = true
	}
	for i := range 4100 {
		for _, a := range []netip.Addr{podAddr(i), {}, netip.IPv6Unspecified()} {
			known[a] = true
		}
	}
	for a := range known {
		if s.Endpoint(a) != owners[a] || fmt.Sprint(s.nodesOf(a)) != fmt.Sprint(nodes[a]) {
			t.Fatalf("generation %d: %s is %v and of nodes %v, want %v and %v", s.Generation(), a, s.Endpoint(a), s.nodesOf(a), owners[a], nodes[a])
		}
	}
	slices.SortFunc(isolated, netip.Addr.Compare)
	slices.SortFunc(judged, netip.Addr.Compare)
	if !slices.Equal(s.IsolatedAddrs(), isolated) || !slices.Equal(s.JudgedAddrs(), judged) {
		t.Fatalf("generation %d: the lists of isolated and judged addresses are wrong", s.Generation())
	}
}

// TestStampsChangeWithMeaning: an address keeps its stamp as long as it means
// the same, whatever endpoint it has.
func TestStampsChangeWithMeaning(t *testing.T) {
	k := keyOf(web)
	s := pair(1, nil, 2)
	same := *s.Endpoint(web)
	next := s.Next(Change{Generation: 2, Owners: map[netip.Addr]*Endpoint{web: &same}})
	if next.stamps != s.stamps {
		t.Error("an endpoint that means the same brought a new stamp")
	}
	other := same
	other.Meaning++
	if next = next.Next(Change{Generation: 3, Owners: map[netip.Addr]*Endpoint{web: &other}}); next.stamps[k.stampSlot()] != 3 {
		t.Error("an endpoint that means something else kept the stamp")
	}
	if next = next.Next(Change{Generation: 4, Owners: map[netip.Addr]*Endpoint{web: nil}}); next.stamps[k.stampSlot()] != 4 || next.Endpoint(web) != nil {
		t.Error("an address whose pod is gone kept its stamp, or its pod")
	}
}

// TestEndIsACacheLine: a decision waits for memory more than for anything else.
func TestEndIsACacheLine(t *testing.T) {
	if size := unsafe.Sizeof(end{}); size != 64 {
		t.Errorf("an end takes %d bytes", size)
	}
}
