package filter

import (
	"net/netip"
	"strings"
	"testing"
)

// kernelUnknown gives a set of unknown pods' members, as the ipset command lists them.
func kernelUnknown(t *testing.T, fam family) string {
	t.Helper()
	members := kernelRun(t, "ipset list "+fam.unknown().name+" | sed '1,/^Members/d' | LC_ALL=C sort")
	return strings.ReplaceAll(strings.TrimSpace(members), "\n", ", ")
}

func kernelPrefixes(s string) (list []netip.Prefix) {
	for _, f := range strings.Fields(s) {
		list = append(list, netip.MustParsePrefix(f))
	}
	return list
}

func kernelHolding(c *KernelConfig) { c.HoldUnknown = true }

// TestUnknownSets: ranges, and exceptions from them.
func TestUnknownSets(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, `ip link add cni0 type bridge
		ip addr add 10.0.0.1/25 brd + dev cni0
		ip addr add fd00::1/64 dev cni0 nodad`)
	k := kernelNew(t, backendNFT, kernelHolding)
	const ends4 = "10.0.0.0 nomatch, 10.0.0.0/24, 10.0.0.1 nomatch, 10.0.0.127 nomatch"
	for _, c := range []struct{ name, ranges, known, v4, v6 string }{
		{"nothing", "", "10.0.0.2", "", ""},
		{"a range", "10.0.0.0/24", "", ends4 + ", 10.0.0.255 nomatch", ""},
		{"known pods", "10.0.0.0/24 fd00::/64", "10.0.0.2 10.0.1.2 fd00::2 ::ffff:10.0.0.3",
			"10.0.0.0 nomatch, 10.0.0.0/24, 10.0.0.1 nomatch, 10.0.0.127 nomatch, 10.0.0.2 nomatch, 10.0.0.255 nomatch, 10.0.0.3 nomatch",
			"fd00:: nomatch, fd00::/64, fd00::1 nomatch, fd00::2 nomatch"},
		{"others", "10.0.0.0/24", "10.0.0.4", ends4 + ", 10.0.0.255 nomatch, 10.0.0.4 nomatch", ""},
		{"another range", "10.8.0.0/31 10.9.0.0/16 10.7.0.7/32", "10.9.0.9", "10.8.0.0/31, 10.9.0.0 nomatch, 10.9.0.0/16, 10.9.0.9 nomatch, 10.9.255.255 nomatch", ""},
		{"nothing again", "", "", "", ""},
	} {
		k.WatchUnknown(kernelPrefixes(c.ranges), kernelAddrs(c.known))
		kernelOK(t, k.SetIsolated(nil))
		if v4, v6 := kernelUnknown(t, 4), kernelUnknown(t, 6); v4 != c.v4 || v6 != c.v6 {
			t.Errorf("%s: members\n%q and\n%q, want\n%q and\n%q", c.name, v4, v6, c.v4, c.v6)
		}
	}
}

// TestUnknownSetsRepaired: what others do to a set is put right, an exception that
// isn't one any more included; a bridge that comes later needs no repair.
func TestUnknownSetsRepaired(t *testing.T) {
	kernelNetns(t)
	k := kernelNew(t, backendNFT, kernelHolding)
	k.WatchUnknown(kernelPrefixes("10.0.0.0/24 fd00::/64"), kernelAddrs("10.0.0.2 fd00::2"))
	kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.2")))
	kernelOK(t, k.Install())
	want4, want6 := kernelUnknown(t, 4), kernelUnknown(t, 6)
	for _, damage := range []string{
		"ipset flush portcullis-unknown-4", "ipset flush portcullis-unknown-6",
		"ipset del portcullis-unknown-4 10.0.0.2; ipset add portcullis-unknown-4 10.0.0.2",
		"ipset add portcullis-unknown-4 10.0.0.9 nomatch", "ipset del portcullis-unknown-4 10.0.0.0/24",
	} {
		kernelRun(t, damage)
		said, err := k.Repair()
		kernelOK(t, err)
		if text := strings.Join(said, "; "); len(said) != 1 || !strings.Contains(text, "portcullis-unknown-") {
			t.Errorf("%s: repaired %q", damage, text)
		}
		if v4, v6 := kernelUnknown(t, 4), kernelUnknown(t, 6); v4 != want4 || v6 != want6 {
			t.Errorf("%s: members %q and %q, want %q and %q", damage, v4, v6, want4, want6)
		}
	}
	// A pod that is known by now is an exception only together with its being isolated.
	k.WatchUnknown(kernelPrefixes("10.0.0.0/24 fd00::/64"), kernelAddrs("10.0.0.2 10.0.0.3 fd00::2"))
	if said, err := k.Repair(); err != nil || len(said) > 0 || kernelUnknown(t, 4) != want4 {
		t.Errorf("before it is isolated: repaired %q, %v; members %q", said, err, kernelUnknown(t, 4))
	}
	kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.2 10.0.0.3")))
	if got := kernelUnknown(t, 4); !strings.Contains(got, "10.0.0.3 nomatch") {
		t.Errorf("when it is isolated: members %q", got)
	}
	kernelRun(t, "ip link add cni0 type bridge; ip addr add 10.0.0.1/24 brd + dev cni0")
	if said, err := k.Repair(); err != nil || len(said) > 0 {
		t.Errorf("a bridge has come, and repaired was %q, %v", said, err)
	}
	if got := kernelUnknown(t, 4); !strings.Contains(got, "10.0.0.1 nomatch") {
		t.Errorf("the bridge's address is no exception: %s", got)
	}
	kernelOK(t, k.Remove())
	if left := kernelRun(t, "ipset list -n"); left != "" {
		t.Errorf("left: %s", left)
	}
}

// TestUnknownRules: two rules more, however many pods, and none without.
func TestUnknownRules(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend, kernelHolding)
		many := kernelMany(500)
		k.WatchUnknown(kernelPrefixes("10.1.0.0/16 fd01::/64"), many)
		kernelOK(t, k.SetIsolated(many))
		kernelOK(t, k.Install())
		got, n := kernelTables(t, backend), strings.Count(kernelWant(), "\n")+4
		if strings.Count(got, "\n") != n {
			t.Errorf("%d lines, want %d:\n%s", strings.Count(got, "\n"), n, got)
		}
		for _, want := range []string{"portcullis-unknown-4 src", "portcullis-unknown-4 dst", "portcullis-unknown-6 src", "portcullis-unknown-6 dst"} {
			if strings.Count(got, "--match-set "+want+" -j NFQUEUE --queue-balance 100:103 --queue-cpu-fanout") != 1 {
				t.Errorf("no rule of %s in\n%s", want, got)
			}
		}
		if again, err := k.Repair(); err != nil || len(again) > 0 {
			t.Errorf("nothing was wrong, but repaired is %q, %v", again, err)
		}
	})
}

// TestUnknownIsQueued: packets of who isn't known don't pass without a verdict, in
// either direction and family; those of who is known do.
func TestUnknownIsQueued(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		stranger := kernelAddPod(t, "stranger", "10.0.0.9", "fd00::9")
		web := kernelAddPod(t, "web", "10.0.0.2", "fd00::2")
		outside := kernelAddPod(t, "outside", "192.0.2.1", "fd99::1")
		k := kernelNew(t, backend, kernelHolding)
		k.WatchUnknown(kernelPrefixes("10.0.0.0/24 fd00::/64"), kernelAddrs("10.0.0.2 fd00::2"))
		kernelOK(t, k.SetIsolated(nil))
		kernelOK(t, k.Install())
		for _, c := range []struct {
			name     string
			from, to kernelPod
			want     int
		}{
			{"known to outside", web, outside, 2}, {"outside to known", outside, web, 2},
			{"unknown to known", stranger, web, 0}, {"known to unknown", web, stranger, 0},
			{"unknown to outside", stranger, outside, 0}, {"outside to unknown", outside, stranger, 0},
		} {
			from, to := kernelSocket(t, c.from, "udp"), kernelSocket(t, c.to, "udp")
			kernelSend(t, from, "x", kernelTarget(c.to.v4, to))
			kernelSend(t, from, "x", kernelTarget(c.to.v6, to))
			if got := kernelRecv(t, to, c.want); got["x"] != c.want {
				t.Errorf("%s: %d arrived, want %d", c.name, got["x"], c.want)
			}
		}
	})
}
