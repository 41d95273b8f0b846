package verdict

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// TestTableAgainstOracle compares compiled tables with a walk over the rules:
// small ones, ones of several words, and ones of more selectors than are
// scanned.
func TestTableAgainstOracle(t *testing.T) {
	shapes := []struct{ worlds, rules, selectors, kind int }{
		{400, 6, 4, 0}, {200, 12, 6, 0}, {60, 80, 6, 1}, {60, 60, 30, 1}, {15, 400, 200, 1},
	}
	for _, shape := range shapes {
		t.Run(fmt.Sprintf("%d rules, %d selectors", shape.rules, shape.selectors), func(t *testing.T) {
			var kinds [2]int
			for seed := range uint64(shape.worlds) {
				table := compareTable(t, randomWorld(rand.New(rand.NewPCG(seed, 1)), shape.rules, shape.selectors), seed)
				if table.match.rare&rareWide == 0 {
					kinds[0]++
				} else {
					kinds[1]++
				}
			}
			if kinds[shape.kind] < shape.worlds/3 {
				t.Errorf("%d narrow tables and %d wide ones", kinds[0], kinds[1])
			}
		})
	}
}

func compareTable(t *testing.T, w *world, seed uint64) *Table {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 2))
	table := NewTable(w.policies, w.nsBits, w.pod)
	s := NewSnapshot(Input{Generation: 1, NamespaceBits: w.nsBits, PodBits: w.pod}, nil)
	check := func(peer *Endpoint, a netip.Addr) {
		f := &Flow{Src: a, Proto: testProtocols[r.IntN(len(testProtocols))]}
		if f.Proto.HasPorts() {
			f.DstPort = uint16(r.IntN(8))
			if r.IntN(10) == 0 {
				f.DstPort = 65535
			}
		}
		names := w.subject.Ports
		wantRef, want := w.admit(peer, a, f, names)
		pod := *w.subject
		pod.Ingress = table
		subject, from := newEnd(addrKey{}, &pod, nil), newEnd(keyOf(a), peer, nil)
		var side Side
		side.open(&subject, table.match, false)
		side.close(table.match.admit(s, &subject, &from, &from.addrKey, f, table.match.open(f, &subject), &subject))
		gotRef, got := side.AllowedBy(), side.Verdict == Allow
		if got != want || gotRef != wantRef {
			t.Fatalf("seed %d: flow %+v peer %+v: got %v %v, want %v %v (%d policies)", seed, f, peer, gotRef, got, wantRef, want, len(w.policies))
		}
	}
	for range 4 {
		for _, p := range w.peers {
			check(p, p.Addrs[0])
		}
		for _, a := range w.outside {
			check(nil, a)
		}
	}
	return table
}

func TestTableNamesItsPoliciesSorted(t *testing.T) {
	table := NewTable([]Policy{{Name: "a/z"}, {Name: "a/b"}}, nil, nil)
	if got := fmt.Sprint(table.Policies()); got != "[a/b a/z]" {
		t.Errorf("policies %s", got)
	}
}

func TestBlocksHoldTheUnionOfWhatCoversThem(t *testing.T) {
	wide := Block{CIDR: prefix("10.0.0.0/8"), Except: []netip.Prefix{prefix("10.1.0.0/16"), prefix("10.1.2.0/24")}}
	narrow := Block{CIDR: prefix("10.1.2.0/24")}
	trie := buildBlocks([]Block{wide, narrow}, []int{0, 1}, 1, 2)
	for a, want := range map[string]uint64{
		"10.0.0.1": 1, // the wide block alone
		"10.1.0.1": 0, // its exception
		"10.1.2.1": 2, // inside the exception, but the narrow block's own
		"10.2.0.1": 1, // past both
	} {
		got := trie.lookup(addr(a))
		if got == nil || got[0] != want {
			t.Errorf("%s: rows %b, want %b", a, got, want)
		}
	}
	if trie.lookup(addr("11.0.0.1")) != nil {
		t.Error("11.0.0.1 is in no block")
	}
}

func TestPortRangesOfOneRuleMayOverlap(t *testing.T) {
	rules := []Rule{{Ports: []PortRange{{TCP, 10, 20}, {TCP, 15, 30}, {TCP, 31, 65535}}}, {Ports: []PortRange{{UDP, 10, 10}}}}
	index := buildPorts(TCP, rules, [][]int{{0}, {1}}, 1)
	for port, want := range map[uint16]uint64{0: 0, 9: 0, 10: 1, 20: 1, 21: 1, 30: 1, 31: 1, 65535: 1} {
		var got uint64
		if r := index.lookup(port); r != nil {
			got = r[0]
		}
		if got != want {
			t.Errorf("port %d: rows %b, want %b", port, got, want)
		}
	}
	if len(index.starts) != 2 {
		t.Errorf("%d intervals: equal neighbours weren't joined", len(index.starts))
	}
}
