package verdict

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func prefixes(texts string) (list []netip.Prefix) {
	for _, s := range strings.Fields(texts) {
		list = append(list, netip.MustParsePrefix(s))
	}
	return list
}

// TestPodRanges: which addresses must be pods'.
func TestPodRanges(t *testing.T) {
	for _, c := range []struct{ ranges, in, out string }{
		{"10.1.0.0/24", "10.1.0.1 10.1.0.254", "10.1.0.0 10.1.0.255 10.0.255.255 10.1.1.0 ::a01:1"},
		{"10.1.0.77/24 10.1.0.0/24", "10.1.0.1", "10.1.0.0"},
		{"10.1.0.0/31", "10.1.0.0 10.1.0.1", "10.1.0.2"},
		{"10.1.0.8/32", "10.1.0.8", "10.1.0.9"},
		{"128.0.0.0/1", "128.0.0.1 255.255.255.254", "127.0.0.1 255.255.255.255"},
		{"fd00:1::/64", "fd00:1::1 fd00:1::ffff:ffff:ffff:ffff", "fd00:1:: fd00:1:0:1:: fd00:0:ffff:ffff:ffff:ffff:ffff:ffff"},
		{"fd00:1::/48 10.0.0.0/8", "fd00:1:0:1:: fd00:1:0:ffff::1 10.255.0.0", "fd00:1:1:: 11.0.0.1"},
		{"fd00:1::8/127", "fd00:1::8 fd00:1::9", "fd00:1::a"},
		{"fd00:1::/120", "fd00:1::ff", "fd00:1:: fd00:1::100"},
		{"0.0.0.0/0 ::/0", "", "10.1.0.1 fd00::1"},
	} {
		s := NewSnapshot(Input{Generation: 1, Ranges: NewPodRanges(prefixes(c.ranges), Deny)}, nil)
		for want, addrs := range map[bool]string{true: c.in, false: c.out} {
			for _, a := range strings.Fields(addrs) {
				if s.Unknown(netip.MustParseAddr(a)) != want {
					t.Errorf("%s: unknown(%s) is %v", c.ranges, a, !want)
				}
			}
		}
	}
	if NewPodRanges(nil, Deny) != nil {
		t.Error("no ranges are something")
	}
}

// unknownWorld has web 10.1.0.2, which isn't isolated, db 10.1.0.3, which lets
// 10.1.0.0/24 in, and shut 10.1.0.4, which lets nobody in; and the node 10.1.0.1.
func unknownWorld(v Verdict) Input {
	owners := map[netip.Addr]*Endpoint{}
	add := func(name, addr string, rules ...Rule) {
		e := &Endpoint{Namespace: "a", Name: name, UID: name, Node: "n", Judged: true, Meaning: uint64(len(owners)) + 1,
			Addrs: []netip.Addr{netip.MustParseAddr(addr)}}
		if name != "web" {
			e.Ingress = NewTable([]Policy{{Name: "a/" + name, Rules: rules}}, nil, nil)
		}
		owners[e.Addrs[0]] = e
	}
	add("web", "10.1.0.2")
	add("db", "10.1.0.3", Rule{AnyPort: true, Blocks: []Block{{CIDR: netip.MustParsePrefix("10.1.0.0/24")}}})
	add("shut", "10.1.0.4")
	return Input{Generation: 1, Owners: owners, Nodes: map[netip.Addr][]string{netip.MustParseAddr("10.1.0.1"): {"n"}},
		Ranges: NewPodRanges(prefixes("10.1.0.0/24 fd00:1::/64"), v)}
}

func unknownFlow(src, dst string) *Flow {
	return &Flow{Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Proto: TCP, DstPort: 80}
}

// TestUnknownPods: what becomes of flows of a pod that nobody knows.
func TestUnknownPods(t *testing.T) {
	nd := unknownFlow("fd00:1::9", "fd00:1::8")
	nd.Proto, nd.ICMPType = ICMPv6, 135
	cut := unknownFlow("10.1.0.9", "10.1.0.2")
	cut.Defect = ReasonTruncated
	for _, c := range []struct {
		name        string
		f           *Flow
		unknown     bool
		deny, allow string
	}{
		{"nobody to a pod", unknownFlow("10.1.0.9", "10.1.0.2"), true, "deny unknown-pod", "allow unknown-pod"},
		{"a pod to nobody", unknownFlow("10.1.0.2", "10.1.0.9"), true, "deny unknown-pod", "allow unknown-pod"},
		{"two nobodies", unknownFlow("fd00:1::9", "fd00:1::8"), true, "deny unknown-pod", "allow unknown-pod"},
		{"nobody to one whose rule fits", unknownFlow("10.1.0.9", "10.1.0.3"), true, "deny unknown-pod", "allow rule"},
		{"nobody to one that's shut", unknownFlow("10.1.0.9", "10.1.0.4"), true, "deny no-rule", "deny no-rule"},
		{"nobody, cut", cut, true, "deny unknown-pod", "allow unknown-pod"},
		{"from outside", unknownFlow("192.0.2.1", "10.1.0.2"), false, "allow not-isolated", "allow not-isolated"},
		{"broadcast", unknownFlow("10.1.0.2", "10.1.0.255"), false, "allow not-isolated", "allow not-isolated"},
		{"the node", unknownFlow("10.1.0.1", "10.1.0.2"), false, "allow own-node", "allow own-node"},
		{"neighbour discovery", nd, false, "allow neighbour-discovery", "allow neighbour-discovery"},
		{"unreadable", &Flow{Defect: ReasonMalformed}, false, "deny malformed", "deny malformed"},
	} {
		for v, want := range map[Verdict]string{Deny: c.deny, Allow: c.allow} {
			s := NewSnapshot(unknownWorld(v), nil)
			e := NewEngine()
			e.Swap(s)
			w := e.NewWorker(16)
			for i, d := range []Decision{s.Decide(c.f), *w.Decide(c.f), *w.Decide(c.f)} {
				if got := d.Verdict.String() + " " + d.Reason.String(); got != want || d.Unknown != c.unknown {
					t.Errorf("%s, unknown pods %s, try %d: %s, unknown %v", c.name, v, i, got, d.Unknown)
				}
			}
		}
	}
}

// TestUnknownBecomesKnown: a cached verdict about an unknown pod is none about the
// pod; nor is the one about a pod good for the one that has its address after it.
func TestUnknownBecomesKnown(t *testing.T) {
	in := unknownWorld(Deny)
	e := NewEngine()
	s := NewSnapshot(in, nil)
	e.Swap(s)
	w := e.NewWorker(16)
	f := unknownFlow("10.1.0.9", "10.1.0.2")
	nine := netip.MustParseAddr("10.1.0.9")
	pod := func(uid string, meaning uint64, shut bool) *Endpoint {
		p := &Endpoint{Namespace: "a", Name: "new", UID: uid, Judged: true, Meaning: meaning, Addrs: []netip.Addr{nine}}
		if shut {
			p.Egress = NewTable([]Policy{{Name: "a/shut"}}, nil, nil)
		}
		return p
	}
	for i, step := range []struct {
		pod     *Endpoint
		want    string
		vacated bool
	}{
		{nil, "deny unknown-pod", false},
		{pod("u1", 101, false), "allow not-isolated", false},
		{pod("u1", 102, true), "deny no-rule", false},
		{pod("u1", 103, false), "allow not-isolated", false},
		{pod("u2", 104, true), "deny no-rule", true},
		{nil, "deny unknown-pod", true},
		{pod("u2", 104, false), "allow not-isolated", false},
		{pod("u3", 105, false), "allow not-isolated", true},
	} {
		s = s.Next(Change{Generation: uint64(i) + 2, Ranges: in.Ranges, Owners: map[netip.Addr]*Endpoint{nine: step.pod}})
		e.Swap(s)
		for range 2 {
			if d := w.Decide(f); d.Verdict.String()+" "+d.Reason.String() != step.want {
				t.Errorf("step %d: %s %s, want %s", i, d.Verdict, d.Reason, step.want)
			}
		}
		if got := slices.Contains(s.Vacated(), nine); got != step.vacated {
			t.Errorf("step %d: vacated %v", i, got)
		}
		if known := slices.Contains(s.KnownAddrs(), nine); known != (step.pod != nil) {
			t.Errorf("step %d: known %v", i, s.KnownAddrs())
		}
	}
	// Other ranges are other decisions, cached ones included.
	s = s.Next(Change{Generation: 90, Owners: map[netip.Addr]*Endpoint{nine: nil}})
	e.Swap(s)
	if d := w.Decide(f); d.Reason != ReasonNotIsolated || len(s.KnownAddrs()) != 0 {
		t.Errorf("without ranges: %s, known %v", d.Reason, s.KnownAddrs())
	}
	s = s.Next(Change{Generation: 91, Ranges: in.Ranges})
	e.Swap(s)
	if d := w.Decide(f); d.Reason != ReasonUnknownPod {
		t.Errorf("with ranges again: %s", d.Reason)
	}
	if got := len(s.KnownAddrs()); got != 4 {
		t.Errorf("%d addresses are known, want the node's and three pods': %v", got, s.KnownAddrs())
	}
}

// TestUnknownNoAllocs: nor does a flow of an unknown pod allocate.
func TestUnknownNoAllocs(t *testing.T) {
	e := NewEngine()
	e.Swap(NewSnapshot(unknownWorld(Deny), nil))
	for _, size := range []int{0, 16} {
		w := e.NewWorker(size)
		f := unknownFlow("10.1.0.9", "10.1.0.2")
		if n := testing.AllocsPerRun(100, func() { w.Decide(f) }); n != 0 {
			t.Errorf("cache of %d: %v allocations", size, n)
		}
	}
}
