package filter

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// told tells whether something is told within a time.
func told(altered <-chan struct{}, within time.Duration) bool {
	select {
	case <-altered:
		return true
	case <-time.After(within):
		return false
	}
}

// TestWatch: whatever opens or alters the gate is told of, and Repair has it to mend;
// what others do elsewhere isn't.
func TestWatch(t *testing.T) {
	const quiet = 5 * watchEvery
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 10.0.0.2 fd00::1")))
		kernelOK(t, k.Install())
		altered, err := k.Watch(t.Context())
		kernelOK(t, err)
		for _, step := range []struct {
			name, script string
			tells        bool
		}{
			{"nothing", "true", false},
			{"flush", "iptables-" + backend + " -t mangle -F", true},
			{"flush IPv6", "ip6tables-" + backend + " -t mangle -F", true},
			{"the jump", "iptables-" + backend + " -t mangle -F FORWARD", true},
			{"another table", "iptables-" + backend + " -t filter -A FORWARD -j ACCEPT; ip6tables-" + backend + " -t filter -A INPUT -j ACCEPT", false},
			{"other rules of nftables", "nft add table inet mangle; nft add table ip others; nft delete table ip others", false},
			{"a set is flushed", "ipset flush portcullis-4", true},
			{"a member", "ipset del portcullis-6 fd00::1", true},
			{"one too many", "ipset add portcullis-4 10.9.9.9", true},
			{"a stranger's set", "ipset create strange hash:ip; ipset add strange 10.9.9.9; ipset flush strange", false},
			{"all rules and sets", "for i in iptables ip6tables; do printf '*mangle\\nCOMMIT\\n' | $i-" + backend + "-restore; done\n" +
				"for i in 1 2 3 4 5 6 7 8 9; do sleep 0.1; ipset destroy && exit; done; exit 1", true},
		} {
			for told(altered, quiet) { // of the last repair
			}
			kernelRun(t, step.script)
			within := quiet
			if step.tells {
				within = 10 * time.Second
			}
			if told(altered, within) != step.tells {
				t.Errorf("%s: told %v, want %v", step.name, !step.tells, step.tells)
			}
			repaired, err := k.Repair()
			kernelOK(t, err)
			if (len(repaired) > 0) != step.tells {
				t.Errorf("%s: repaired %q", step.name, repaired)
			}
		}
		for told(altered, quiet) {
		}
		// Changes of its own sets are none.
		for range 20 {
			kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1 fd00::2")))
			kernelOK(t, k.SetIsolated(nil))
		}
		if told(altered, quiet) {
			t.Error("told of the sets' own changes")
		}
	})
}

// TestSetSize: the sizes asked for are those that a listing counts, and asking again and
// again allocates nothing.
func TestSetSize(t *testing.T) {
	kernelNetns(t)
	c, err := openSetCounter()
	kernelOK(t, err)
	defer c.close()
	for _, fam := range []family{4, 6} {
		set := fam.isolated().at(0)
		if _, err := c.size(set); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s isn't there: %v", set.name, err)
		}
		kernelOK(t, createSet(set))
		for _, n := range []int{0, 1, 7, 1500, 1501} {
			want := map[netip.Addr]bool{}
			for i := range n {
				a := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
				if fam == 6 {
					a = netip.AddrFrom16([16]byte{0xfd, 14: byte(i >> 8), 15: byte(i)})
				}
				want[a] = true
			}
			_, _, err := fillSet(set, want)
			kernelOK(t, err)
			listed, _, err := readSet(set)
			kernelOK(t, err)
			if got, err := c.size(set); err != nil || got != len(listed) || got != n {
				t.Errorf("%s: %d, %v; %d are listed, want %d", set.name, got, err, len(listed), n)
			}
		}
		if n := testing.AllocsPerRun(100, func() { _, _ = c.size(set) }); n != 0 {
			t.Errorf("asking allocates %v times", n)
		}
	}
}

// Listings of any bytes are no reason to panic.
func FuzzParseSetSize(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 12, 0, 7, 128, 8, 0, 24, 64, 0, 0, 0, 9})
	f.Add([]byte{2, 0, 0, 0, 12, 0, 7, 128, 9, 0, 24, 64, 0, 0, 0, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, ok := parseSetSize(b); !ok && n != 0 || ok && len(b) < 16 {
			t.Errorf("%x: %d, %v", b, n, ok)
		}
	})
}

// Events of any bytes are no reason to panic.
func FuzzConcernsMangle(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 11, 0, 1, 0, 'm', 'a', 'n', 'g', 'l', 'e', 0, 0}, uint16(0xa07))
	f.Add([]byte{2, 0, 0, 0, 11, 0, 1}, uint16(0xa07))
	f.Fuzz(func(t *testing.T, b []byte, kind uint16) {
		m := netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind)}, Data: b}
		if concernsMangle(m) && (len(b) < 14 || b[0] != 2 && b[0] != 10) {
			t.Errorf("%x", b)
		}
	})
}
