package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// kernelMembers gives a set's members, as the ipset command lists them.
func kernelMembers(t *testing.T, fam family) string {
	t.Helper()
	return strings.Join(strings.Fields(kernelRun(t, "ipset list "+fam.set()+" -sorted | sed '1,/^Members/d'")), " ")
}

func TestSetIsolated(t *testing.T) {
	kernelNetns(t)
	k := kernelNew(t, backendNFT)
	for _, c := range []struct{ name, addrs, v4, v6 string }{
		{"first", "10.0.0.1 10.0.0.2 fd00::1", "10.0.0.1 10.0.0.2", "fd00::1"},
		{"same", "fd00::1 10.0.0.2 10.0.0.1 10.0.0.1", "10.0.0.1 10.0.0.2", "fd00::1"},
		{"4-in-6", "::ffff:10.0.0.9 fe80::1%eth0", "10.0.0.9", "fe80::1"},
		{"changed", "10.0.0.2 10.0.0.3 fd00::2", "10.0.0.2 10.0.0.3", "fd00::2"},
		{"none", "", "", ""},
	} {
		kernelOK(t, k.SetIsolated(kernelAddrs(c.addrs)))
		if v4, v6 := kernelMembers(t, 4), kernelMembers(t, 6); v4 != c.v4 || v6 != c.v6 {
			t.Errorf("%s: members %q and %q, want %q and %q", c.name, v4, v6, c.v4, c.v6)
		}
	}
	// An address that isn't one is no member, and no harm.
	kernelOK(t, k.SetIsolated([]netip.Addr{{}, netip.MustParseAddr("10.0.0.1")}))
	if got := kernelMembers(t, 4); got != "10.0.0.1" {
		t.Errorf("members %q", got)
	}
	head := kernelRun(t, "ipset list -t portcullis-4; ipset list -t portcullis-6")
	for _, want := range []string{"hash:ip", "family inet ", "family inet6 ", "maxelem 262144"} {
		if !strings.Contains(head, want) {
			t.Errorf("no %q in\n%s", want, head)
		}
	}
}

// TestFillSetByDifference: only what differs is touched.
func TestFillSetByDifference(t *testing.T) {
	kernelNetns(t)
	kernelOK(t, createSet(family(4).isolated()))
	for _, c := range []struct {
		addrs          string
		added, removed int
	}{
		{"10.0.0.1 10.0.0.2", 2, 0},
		{"10.0.0.1 10.0.0.2", 0, 0},
		{"10.0.0.2 10.0.0.3", 1, 1},
		{"", 0, 2},
	} {
		want := map[netip.Addr]bool{}
		for _, a := range kernelAddrs(c.addrs) {
			want[a] = true
		}
		added, removed, err := fillSet(family(4).isolated(), want)
		if err != nil || added != c.added || removed != c.removed {
			t.Errorf("%q: %d added, %d removed, %v; want %d and %d", c.addrs, added, removed, err, c.added, c.removed)
		}
	}
}

// TestManyMembers lists and fills sets that take several netlink messages.
func TestManyMembers(t *testing.T) {
	kernelNetns(t)
	k := kernelNew(t, backendNFT)
	kernelOK(t, k.SetIsolated(kernelMany(2000)))
	for _, fam := range []family{4, 6} {
		if members, ok, err := readSet(fam.isolated()); err != nil || !ok || len(members) != 2000 {
			t.Errorf("%s: %d members, %t, %v", fam, len(members), ok, err)
		}
	}
}

// TestInstallKeepsMembers: after a restart, before anyone knows who is
// isolated, those of the earlier run stay shut.
func TestInstallKeepsMembers(t *testing.T) {
	kernelNetns(t)
	kernelOK(t, kernelNew(t, backendNFT).SetIsolated(kernelAddrs("10.0.0.1")))
	k := kernelNew(t, backendNFT)
	kernelOK(t, k.Install())
	if said, err := k.Repair(); err != nil || len(said) > 0 {
		t.Errorf("repair says %q, %v", said, err)
	}
	if got := kernelMembers(t, 4); got != "10.0.0.1" {
		t.Errorf("members %q", got)
	}
}

func TestRepairSets(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 10.0.0.2 fd00::1 fd00::2")))
		kernelOK(t, k.Install())
		for _, c := range []struct{ name, script, want string }{
			{"nothing", "", ""},
			{"flushed", "ipset flush SET", "lacked 2 members"},
			{"member gone", "ipset del SET $(ipset list SET | tail -n 1)", "lacked 1 members and had 0"},
			{"set gone", "IPT -F; IPT -X; sleep 0.3; ipset destroy SET", "was missing"},
		} {
			kernelBoth(t, backend, c.script)
			kernelMend(t, k, "repair", c.name, c.want, 4, 6)
			if v4, v6 := kernelMembers(t, 4), kernelMembers(t, 6); v4 != "10.0.0.1 10.0.0.2" || v6 != "fd00::1 fd00::2" {
				t.Errorf("%s: members %q and %q", c.name, v4, v6)
			}
			kernelCheckShut(t, c.name, backend)
		}
		kernelRun(t, "ipset add portcullis-4 192.0.2.7")
		if said, err := k.Repair(); err != nil || !strings.Contains(fmt.Sprint(said), "had 1 too many") {
			t.Errorf("with a stranger in the set, repair says %q, %v", said, err)
		}
	})
}

func kernelCheckShut(t *testing.T, name, backend string) {
	t.Helper()
	for _, part := range strings.Split(kernelTables(t, backend), "---\n") {
		if why := kernelOpen(parseListing(part), "FORWARD", "OUTPUT"); why != "" {
			t.Errorf("%s: %s:\n%s", name, why, part)
		}
	}
}

func TestSetOfOtherType(t *testing.T) {
	kernelNetns(t)
	k := kernelNew(t, backendNFT)
	for _, typ := range []string{"hash:net", "hash:ip family inet6"} {
		kernelRun(t, "ipset create portcullis-4 "+typ)
		for _, err := range []error{k.SetIsolated(nil), k.Install()} {
			if err == nil || !strings.Contains(err.Error(), "portcullis cleanup") {
				t.Errorf("%s: got %v", typ, err)
			}
		}
		kernelOK(t, Cleanup(kernelQuiet(), DefaultMarkBits))
	}
}

// TestMemberThatDoesNotFit: the error names it, the others get in.
func TestMemberThatDoesNotFit(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, "ipset create portcullis-4 hash:ip maxelem 2")
	err := kernelNew(t, backendNFT).SetIsolated(kernelAddrs("10.0.0.1 10.0.0.2 10.0.0.3 fd00::1"))
	if err == nil || !strings.Contains(err.Error(), "add 10.0.0.") {
		t.Errorf("got %v", err)
	}
	if got := kernelMembers(t, 6); got != "fd00::1" {
		t.Errorf("members %q", got)
	}
}

// TestSetsDontWaitForRules has iptables commands that wait, as they do for the
// lock of another program's: a pod is isolated meanwhile.
func TestSetsDontWaitForRules(t *testing.T) {
	ns := kernelNetns(t)
	held := filepath.Join(t.TempDir(), "held")
	kernelFakes(t, backendNFT, strings.ReplaceAll(
		`n=0; while test -e HELD && test $n -lt 200; do n=$((n+1)); touch HELD.waiting; sleep 0.05; done; exec REAL "$@"`, "HELD", held))
	k := kernelNew(t, backendNFT)
	kernelOK(t, k.Install())
	kernelOK(t, os.WriteFile(held, nil, 0o644))
	var repaired atomic.Bool
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread stays in ns
		err := netns.Set(ns)
		for range 1000 {
			if _, missing := os.Stat(held + ".waiting"); missing == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		err = errors.Join(err, k.SetIsolated(kernelAddrs("10.0.0.9 fd00::9")), k.SetsError())
		if repaired.Load() {
			err = errors.Join(err, errors.New("the sets had to wait for the rules"))
		}
		done <- errors.Join(err, os.Remove(held))
	}()
	_, err := k.Repair()
	repaired.Store(true)
	kernelOK(t, err)
	kernelOK(t, <-done)
	if got := kernelRun(t, "ipset list portcullis-4; ipset list portcullis-6"); !strings.Contains(got, "10.0.0.9") || !strings.Contains(got, "fd00::9") {
		t.Errorf("sets:\n%s", got)
	}
}
