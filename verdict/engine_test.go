package verdict

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

var web, db = addr("10.0.0.1"), addr("10.0.0.2")

// pair makes a snapshot of two pods, web and db, of which rules isolate db; nil
// rules leave it alone. meaning is db's.
func pair(generation uint64, prev *Snapshot, meaning uint64, rules ...Rule) *Snapshot {
	everything := Bits{1}
	w := &Endpoint{Namespace: "default", Name: "web", Node: "n1", Addrs: []netip.Addr{web}, Judged: true, Meaning: 1}
	d := &Endpoint{Namespace: "default", Name: "db", Node: "n1", Addrs: []netip.Addr{db, addr("fd00::2")}, Judged: true, Meaning: meaning}
	if rules != nil {
		d.Ingress = NewTable([]Policy{{Name: "default/db", Rules: rules}}, nil, nil)
	}
	return NewSnapshot(Input{
		Generation:    generation,
		Owners:        map[netip.Addr]*Endpoint{web: w, db: d, addr("fd00::2"): d},
		Nodes:         map[netip.Addr][]string{addr("192.168.0.1"): {"n1"}, addr("192.168.0.2"): {"n2"}},
		NamespaceBits: []Bits{everything}, PodBits: []Bits{everything},
	}, prev)
}

func tcp(src, dst netip.Addr, port uint16) *Flow {
	return &Flow{Src: src, Dst: dst, Proto: TCP, SrcPort: 40000, DstPort: port}
}

func with(f *Flow, change func(*Flow)) *Flow { change(f); return f }

var (
	closed    = []Rule{}
	port5432  = Rule{Index: 0, AnyPeer: true, Ports: []PortRange{{TCP, 5432, 5432}}}
	anything  = Rule{Index: 1, AnyPeer: true, AnyPort: true}
	selectAll = Rule{Index: 0, Selectors: []PeerSelector{{0, 0}}, AnyPort: true}
)

func TestDecide(t *testing.T) {
	outside := addr("203.0.113.9")
	for _, row := range []struct {
		name  string
		rules []Rule
		flow  *Flow
		want  string
	}{
		{"nobody isolates", nil, tcp(web, db, 5432), "allow not-isolated"},
		{"no rule", closed, tcp(web, db, 5432), "deny no-rule"},
		{"the rule's port", []Rule{port5432}, tcp(web, db, 5432), "allow rule default/db#0"},
		{"another port", []Rule{port5432}, tcp(web, db, 5433), "deny no-rule"},
		{"the second rule", []Rule{port5432, anything}, tcp(web, db, 1), "allow rule default/db#1"},
		{"a selector's peer", []Rule{selectAll}, tcp(web, db, 1), "allow rule default/db#0"},
		{"no selector matches outside", []Rule{selectAll}, tcp(outside, db, 1), "deny no-rule"},
		{"egress of the isolated pod", closed, tcp(db, web, 1), "allow not-isolated"},
		{"itself", closed, tcp(db, db, 1), "allow self"},
		{"itself by its other address", closed, tcp(addr("fd00::2"), db, 1), "allow self"},
		{"its node", closed, tcp(addr("192.168.0.1"), db, 1), "allow own-node"},
		{"another node", closed, tcp(addr("192.168.0.2"), db, 1), "deny no-rule"},
		{"a port rule and ICMP", []Rule{port5432}, with(tcp(web, db, 0), func(f *Flow) { f.Proto = ICMP }), "deny no-rule"},
		{"any port and ICMP", []Rule{anything}, with(tcp(web, db, 0), func(f *Flow) { f.Proto = ICMP }), "allow rule default/db#1"},
		{"neighbour discovery", closed, &Flow{Src: addr("fd00::1"), Dst: addr("fd00::2"), Proto: ICMPv6, ICMPType: 135}, "allow neighbour-discovery"},
		{"echo is not discovery", closed, &Flow{Src: addr("fd00::1"), Dst: addr("fd00::2"), Proto: ICMPv6, ICMPType: 128}, "deny no-rule"},
		{"discovery inside IPv4", closed, with(tcp(web, db, 0), func(f *Flow) { f.Proto, f.ICMPType = ICMPv6, 135 }), "deny no-rule"},
		{"a fragment", []Rule{anything}, with(tcp(web, db, 0), func(f *Flow) { f.Defect = ReasonFragment }), "deny fragment"},
		{"a fragment to an open pod", nil, with(tcp(web, db, 0), func(f *Flow) { f.Defect = ReasonFragment }), "allow not-isolated"},
		{"no addresses", nil, &Flow{Defect: ReasonMalformed}, "deny malformed"},
		{"no addresses and no word why", nil, &Flow{}, "deny malformed"},
	} {
		engine := NewEngine()
		engine.Swap(pair(1, nil, 2, row.rules...))
		for _, w := range []*Worker{engine.NewWorker(0), engine.NewWorker(4)} {
			for range 2 {
				d := w.Decide(row.flow)
				got := fmt.Sprintf("%s %s", d.Verdict, d.Reason)
				if ref := d.Ingress.AllowedBy(); ref.Policy != "" {
					got += fmt.Sprintf(" %s#%d", ref.Policy, ref.Rule)
				}
				if got != row.want {
					t.Errorf("%s: %s, want %s", row.name, got, row.want)
				}
			}
		}
	}
}

func TestNothingPassesBeforeTheFirstSnapshot(t *testing.T) {
	d := NewEngine().NewWorker(4).Decide(tcp(web, db, 80))
	if d.Verdict != Deny || d.Reason != ReasonNotReady {
		t.Errorf("%s %s before the first snapshot", d.Verdict, d.Reason)
	}
}

func TestSecondConnectionHits(t *testing.T) {
	engine := NewEngine()
	engine.Swap(pair(1, nil, 2, port5432))
	w := engine.NewWorker(8)
	if w.Decide(tcp(web, db, 5432)).Cached {
		t.Error("the first connection was cached")
	}
	if !w.Decide(with(tcp(web, db, 5432), func(f *Flow) { f.SrcPort++ })).Cached {
		t.Error("a second connection from another source port wasn't cached")
	}
	if w.Decide(with(tcp(web, db, 5432), func(f *Flow) { f.Proto = UDP })).Cached {
		t.Error("another protocol was cached")
	}
}

func TestPolicyChangeMakesEntriesUnusable(t *testing.T) {
	engine := NewEngine()
	first := pair(1, nil, 2, port5432)
	engine.Swap(first)
	w := engine.NewWorker(8)
	w.Decide(tcp(web, db, 5432))
	second := pair(2, first, 3, closed...)
	engine.Swap(second)
	if d := w.Decide(tcp(web, db, 5432)); d.Cached || d.Verdict != Deny {
		t.Errorf("after the rule went: %s, cached %v", d.Verdict, d.Cached)
	}
	engine.Swap(pair(3, second, 3, closed...))
	if d := w.Decide(tcp(web, db, 5432)); !d.Cached || d.Verdict != Deny {
		t.Errorf("a snapshot in which nothing changed emptied the cache: %s, cached %v", d.Verdict, d.Cached)
	}
}

// TestUnrelatedChurnKeepsEntries lets one pod in a thousand come and go: its
// verdicts go with it, and nearly all others stay.
func TestUnrelatedChurnKeepsEntries(t *testing.T) {
	pods := func(generation uint64, prev *Snapshot, churned uint64) *Snapshot {
		owners := map[netip.Addr]*Endpoint{}
		for i := range 1000 {
			e := &Endpoint{Name: fmt.Sprint(i), Judged: true, Meaning: uint64(i) + 1}
			if i == 7 {
				e.Meaning = churned
			}
			owners[podAddr(i)] = e
		}
		return NewSnapshot(Input{Generation: generation, Owners: owners}, prev)
	}
	engine := NewEngine()
	snapshot := pods(1, nil, 5000)
	engine.Swap(snapshot)
	w := engine.NewWorker(4096)
	for i := range 1000 {
		w.Decide(tcp(podAddr(i), podAddr((i+1)%1000), 80))
	}
	engine.Swap(pods(2, snapshot, 5001))
	kept := 0
	for i := range 1000 {
		cached := w.Decide(tcp(podAddr(i), podAddr((i+1)%1000), 80)).Cached
		if cached && (i == 6 || i == 7) {
			t.Errorf("the verdict of the changed pod's flow %d was still used", i)
		}
		if cached {
			kept++
		}
	}
	if kept < 980 {
		t.Errorf("a change of one pod of 1,000 left %d of 1,000 entries usable", kept)
	}
}

func podAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }

// TestCacheNeverLies asks a small cache random questions, again and again, over
// a row of changing snapshots, and compares with the uncached answer.
func TestCacheNeverLies(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	engine := NewEngine()
	w := engine.NewWorker(32)
	var snapshot *Snapshot
	hits := 0
	for generation := range uint64(300) {
		rules := [][]Rule{nil, closed, {port5432}, {anything}}[r.IntN(4)]
		// The meaning is a hash of what db is: here, the rules it has.
		snapshot = pair(generation+1, snapshot, hashOf(rules), rules...)
		engine.Swap(snapshot)
		for range 60 {
			f := tcp([]netip.Addr{web, db, podAddr(r.IntN(40))}[r.IntN(3)], db, uint16(5430+r.IntN(4)))
			got, want := *w.Decide(f), snapshot.Decide(f)
			if got.Cached {
				hits++
			}
			if got.Verdict != want.Verdict || got.Reason != want.Reason || got.Ingress.AllowedBy() != want.Ingress.AllowedBy() {
				t.Fatalf("generation %d, %+v: cached %v: %s %s, want %s %s", generation, f, got.Cached, got.Verdict, got.Reason, want.Verdict, want.Reason)
			}
		}
	}
	if hits < 1000 {
		t.Errorf("only %d hits: the cache wasn't tried", hits)
	}
}

func hashOf(rules []Rule) uint64 {
	if rules == nil {
		return 1000
	}
	h := uint64(2000)
	for _, r := range rules {
		h = h*31 + uint64(r.Index) + uint64(len(r.Ports))*7
	}
	return h
}

func TestCacheIsBounded(t *testing.T) {
	engine := NewEngine()
	engine.Swap(pair(1, nil, 2, port5432))
	w := engine.NewWorker(100)
	for port := range 65535 {
		w.Decide(tcp(web, db, uint16(port)))
	}
	if n := len(w.cache.entries); n > 100 {
		t.Errorf("the cache of 100 has room for %d flows", n)
	}
	if !w.Decide(tcp(web, db, 65534)).Cached {
		t.Error("the last flow of a scan of all ports wasn't cached")
	}
}

// TestScanLeavesOthersCached: flows that come back outlive a scan of all ports.
func TestScanLeavesOthersCached(t *testing.T) {
	engine := NewEngine()
	engine.Swap(pair(1, nil, 2, port5432))
	w := engine.NewWorker(256)
	for range 2 {
		for i := range 64 {
			w.Decide(tcp(podAddr(i), db, 5432))
		}
	}
	for port := range 65536 {
		w.Decide(tcp(web, db, uint16(port)))
	}
	kept := 0
	for i := range 64 {
		if w.Decide(tcp(podAddr(i), db, 5432)).Cached {
			kept++
		}
	}
	if kept < 60 {
		t.Errorf("a scan of all ports left %d of 64 flows that come back", kept)
	}
}

func TestDecideNoAllocs(t *testing.T) {
	s := pair(1, nil, 2, port5432, Rule{Index: 1, Blocks: []Block{{CIDR: prefix("10.0.0.0/8")}}, Ports: []PortRange{{UDP, 1, 9}}})
	engine := NewEngine()
	engine.Swap(s)
	w, bare, port := engine.NewWorker(64), engine.NewWorker(0), uint16(0)
	flow := tcp(web, db, 5432)
	for name, decide := range map[string]func(){
		"hit":      func() { w.Decide(flow) },
		"miss":     func() { port++; flow.DstPort = port; w.Decide(flow) },
		"uncached": func() { s.Decide(flow) },
		"no cache": func() { bare.Decide(flow) },
	} {
		if n := testing.AllocsPerRun(2000, decide); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
