package filter

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestParseMarkBits(t *testing.T) {
	for _, c := range []struct {
		in   string
		want uint32
		err  string
	}{
		{"0x3000", 0x3000, ""},
		{"12288", 0x3000, ""},
		{"0x80000001", 0x80000001, ""},
		{"0b11", 3, ""},
		{"0x1000", 0, "have 1 bits set"},
		{"0x7000", 0, "have 3 bits set"},
		{"0", 0, "have 0 bits set"},
		{"0x300000000", 0, "not a 32-bit number"},
		{"-3", 0, "not a 32-bit number"},
		{"", 0, "not a 32-bit number"},
		{"0x3000/0x3000", 0, "not a 32-bit number"},
	} {
		got, err := ParseMarkBits(c.in)
		if got != c.want || (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
			t.Errorf("ParseMarkBits(%q) = 0x%x, %v", c.in, got, err)
		}
	}
}

func TestMarkBits(t *testing.T) {
	for _, c := range []struct{ bits, accepted, revoked uint32 }{
		{DefaultMarkBits, 0x1000, 0x2000},
		{0x80000001, 1, 0x80000000},
	} {
		if a, r := AcceptedMark(c.bits), RevokedMark(c.bits); a != c.accepted || r != c.revoked {
			t.Errorf("0x%x: accepted 0x%x, revoked 0x%x", c.bits, a, r)
		}
	}
}

func TestMarkRivals(t *testing.T) {
	for _, c := range []struct {
		bits uint32
		want string
	}{
		{DefaultMarkBits, ""},
		{0x4001, "kube-proxy"},
		{0x0300, "Cilium"},
		{0x10001, "Weave and kube-router,Calico"},
	} {
		if got := strings.Join(markRivals(c.bits), ","); got != c.want {
			t.Errorf("0x%x: %q, want %q", c.bits, got, c.want)
		}
	}
}

// TestRivalsAreWarnedOf: to take others' bits is allowed, and said.
func TestRivalsAreWarnedOf(t *testing.T) {
	for _, c := range []struct {
		bits uint32
		want bool
	}{{DefaultMarkBits, false}, {0xc000, true}} {
		kernelNetns(t)
		log, text := kernelLog()
		kernelNew(t, backendNFT, func(cfg *KernelConfig) { cfg.MarkBits, cfg.Log = c.bits, log })
		if got := strings.Contains(text.String(), "level=WARN"); got != c.want {
			t.Errorf("0x%x: warned %t\n%s", c.bits, got, text)
		}
	}
}

// TestClearConnmarks clears the two bits of connections of all sorts, leaves
// the others' bits, and leaves the connections themselves.
func TestClearConnmarks(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, `
		conntrack -I -p udp -s 10.0.0.1 -d 10.0.0.2 --sport 1 --dport 2 -t 100 -m 0x1000
		conntrack -I -p tcp -s 10.0.0.1 -d 10.0.0.2 --sport 1 --dport 2 --state ESTABLISHED -t 100 -m 0x2abc
		conntrack -I -p udp -s fd00::1 -d fd00::2 --sport 1 --dport 2 -t 100 -m 0xf3000
		conntrack -I -p icmp -s 10.0.0.1 -d 10.0.0.2 --icmp-type 8 --icmp-code 0 --icmp-id 7 -t 100 -m 0x1001
		conntrack -I -p icmpv6 -s fd00::1 -d fd00::2 --icmpv6-type 128 --icmpv6-code 0 --icmpv6-id 7 -t 100 -m 0x1002
		conntrack -I -p 99 -s 10.0.0.1 -d 10.0.0.2 -t 100 -m 0x1004
		conntrack -I -p udp -s 10.0.0.3 -d 10.0.0.2 --sport 1 --dport 2 -t 100 -m 0x1005 -w 7
		conntrack -I -p udp -s 10.0.0.4 -d 10.0.0.2 --sport 1 --dport 2 -t 100 -m 0xc`)
	marks := func() []string {
		all := regexp.MustCompile(`mark=\d+`).FindAllString(kernelRun(t, "(conntrack -L -f ipv4; conntrack -L -f ipv6) 2>/dev/null"), -1)
		slices.Sort(all)
		return all
	}
	n, err := clearConnmarks(DefaultMarkBits)
	if err != nil || n != 7 {
		t.Errorf("cleared %d, %v; want 7", n, err)
	}
	want := "mark=0 mark=1 mark=12 mark=2 mark=2748 mark=4 mark=5 mark=983040"
	if got := strings.Join(marks(), " "); got != want {
		t.Errorf("marks are %s\nwant      %s", got, want)
	}
	if n, err := clearConnmarks(DefaultMarkBits); n != 0 || err != nil {
		t.Errorf("the second time cleared %d, %v", n, err)
	}
}

// TestMarksOfOtherBits has another run's rules in place, made with other mark
// bits: a new run takes their bits off connections, and so does cleanup.
func TestMarksOfOtherBits(t *testing.T) {
	for _, way := range []string{"install", "cleanup"} {
		t.Run(way, func(t *testing.T) {
			kernelNetns(t)
			old := kernelNew(t, backendLegacy, func(c *KernelConfig) { c.MarkBits = 0x6000 })
			kernelOK(t, old.Install())
			kernelRun(t, "conntrack -I -p udp -s 10.0.0.1 -d 10.0.0.2 --sport 1 --dport 2 -t 100 -m 0x2007")
			if way == "install" {
				kernelOK(t, kernelNew(t, backendNFT).Install())
			} else {
				kernelOK(t, Cleanup(kernelQuiet(), DefaultMarkBits&^0x2000|0x10000))
			}
			if got := kernelRun(t, "conntrack -L 2>/dev/null"); !strings.Contains(got, "mark=7 ") {
				t.Errorf("the connection is %s", got)
			}
		})
	}
}
