package filter

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// kernelDrop takes a capability from the test's thread until the test ends.
func kernelDrop(t *testing.T, capability int) {
	t.Helper()
	runtime.LockOSThread()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all, less [2]unix.CapUserData
	kernelOK(t, unix.Capget(&hdr, &all[0]))
	less = all
	less[capability/32].Effective &^= 1 << (capability % 32)
	kernelOK(t, unix.Capset(&hdr, &less[0]))
	t.Cleanup(func() {
		kernelOK(t, unix.Capset(&hdr, &all[0]))
		runtime.UnlockOSThread()
	})
}

// kernelOneLine checks that an error is of a kind, and one line that says what
// to do.
func kernelOneLine(t *testing.T, err, kind error, advice string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got %v, want %v", err, kind)
	}
	if s := err.Error(); strings.Contains(s, "\n") || !strings.Contains(s, advice) {
		t.Errorf("%q: want one line with %q", s, advice)
	}
	for _, other := range []error{ErrNoNetAdmin, ErrNoIptables, ErrNoNFQueue, ErrNoIpset} {
		if other != kind && errors.Is(err, other) {
			t.Errorf("%v is also %v", err, other)
		}
	}
}

func TestPreflightCapabilities(t *testing.T) {
	for _, capability := range []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW} {
		func() {
			kernelNetns(t)
			kernelDrop(t, capability)
			_, err := NewKernel(KernelConfig{Queues: 1, Log: kernelQuiet()})
			kernelOneLine(t, err, ErrNoNetAdmin, "run as root")
			kernelOneLine(t, Cleanup(kernelQuiet(), DefaultMarkBits), ErrNoNetAdmin, "run as root")
		}()
	}
}

// TestCapabilitiesAreNeeded shows why the manifest asks for two capabilities: with
// either of them alone iptables itself refuses what the rules need. Of the legacy
// backend nothing works without a raw socket, of the other one no match of a set.
func TestCapabilitiesAreNeeded(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		kernelOK(t, createSet(family(4).isolated()))
		rule := "iptables-" + backend + " -t mangle -A FORWARD -m set --match-set " + family(4).set() + " src -j DROP"
		for _, c := range []struct {
			caps string
			ok   bool
		}{{"net_admin,+net_raw", true}, {"net_admin", false}, {"net_raw", false}} {
			_, err := kernelTry("setpriv --bounding-set -all,+" + c.caps + " --inh-caps -all " + rule)
			if (err == nil) != c.ok {
				t.Errorf("%s with %s alone: %v", backend, c.caps, err)
			}
		}
	})
}

func TestPreflightNoIptables(t *testing.T) {
	for _, backend := range []string{"auto", "nft", "legacy"} {
		kernelNetns(t)
		kernelPathOf(t, "")
		_, err := NewKernel(KernelConfig{Backend: backend, Queues: 1, Log: kernelQuiet()})
		kernelOneLine(t, err, ErrNoIptables, "install the package iptables")
	}
}

// TestPreflightRefusals lets iptables refuse rules as it does where the
// kernel lacks a module, in the words of version 1.8.9.
func TestPreflightRefusals(t *testing.T) {
	for _, c := range []struct {
		name, rule, message string
		kind                error
		advice              string
	}{
		{"no NFQUEUE", "NFQUEUE", "iptables: No chain/target/match by that name.", ErrNoNFQueue, "modprobe xt_NFQUEUE"},
		{"old NFQUEUE", "NFQUEUE", "iptables v1.8.9 (legacy): unknown option '--queue-balance'\nTry 'iptables -h' for more information.", ErrNoNFQueue, "modprobe xt_NFQUEUE"},
		{"no set match", "--match-set", "iptables v1.8.9 (nf_tables): Kernel doesn't support ipset\n\nTry", ErrNoIpset, "xt_set"},
		{"no rights", "connmark", "iptables v1.8.9 (legacy): can't initialize iptables table `mangle': Permission denied (you must be root)", ErrNoNetAdmin, "run as root"},
	} {
		t.Run(c.name, func(t *testing.T) {
			kernelNetns(t)
			kernelFakes(t, backendNFT, `case "$*" in *`+c.rule+`*) cat >&2 <<'END'
`+c.message+`
END
exit 1;; esac
exec REAL "$@"`)
			_, err := NewKernel(KernelConfig{Backend: backendNFT, Queues: 2, Log: kernelQuiet()})
			kernelOneLine(t, err, c.kind, c.advice)
			if got := kernelTables(t, backendNFT); strings.Contains(got, "PORTCULLIS") {
				t.Errorf("something was changed:\n%s", got)
			}
		})
	}
}

func TestPreflightOtherRefusal(t *testing.T) {
	err := refusal([]string{"-m", "addrtype"}, errors.New("no\nsuch match"))
	if s := err.Error(); strings.Contains(s, "\n") || !strings.Contains(s, `"-m addrtype"`) {
		t.Errorf("got %q", s)
	}
}

// TestFailedBuildChangesNothing: when a rule is refused half-way, the rules in
// place stay, and of the new ones nothing is left.
func TestFailedBuildChangesNothing(t *testing.T) {
	kernelNetns(t)
	flag := t.TempDir() + "/refuse"
	kernelFakes(t, backendNFT, `case "$*" in *NFQUEUE*) test -e `+flag+` && exit 1;; esac
exec REAL "$@"`)
	k := kernelNew(t, backendNFT)
	kernelOK(t, k.Install())
	kernelOK(t, os.WriteFile(flag, nil, 0o644))
	if err := k.Install(); !errors.Is(err, ErrNoNFQueue) {
		t.Errorf("got %v, want that NFQUEUE is missing", err)
	}
	if got := kernelTables(t, backendNFT); got != kernelWant() {
		t.Errorf("tables are\n%s", got)
	}
	kernelOK(t, os.Remove(flag))
	kernelOK(t, k.Install())
}

func TestBadConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  KernelConfig
		want string
	}{
		{"no queue", KernelConfig{QueueBase: 1}, "give a lower base or fewer"},
		{"beyond the last queue", KernelConfig{QueueBase: 65535, Queues: 2}, "give a lower base or fewer"},
		{"one mark bit", KernelConfig{Queues: 1, MarkBits: 1}, "exactly two"},
		{"backend", KernelConfig{Queues: 1, Backend: "pf"}, "give auto, nft or legacy"},
	} {
		if _, err := NewKernel(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
	}
}

// TestNoIPv6 hides the sign of IPv6 from a thread: IPv4 is enforced alone, and
// one log line says so.
func TestNoIPv6(t *testing.T) {
	kernelThrowaway(t, func() {
		if err := unix.Mount("none", "/proc/thread-self/net", "tmpfs", 0, ""); err != nil {
			t.Error(err)
			return
		}
		log, text := kernelLog()
		k, err := NewKernel(KernelConfig{Backend: backendNFT, QueueBase: 100, Queues: 4, Log: log})
		if err == nil {
			err = errors.Join(k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")), k.Install())
		}
		if err != nil {
			t.Error(err)
			return
		}
		if n := strings.Count(text.String(), "no IPv6"); n != 1 {
			t.Errorf("%d lines say that there is no IPv6:\n%s", n, text)
		}
		v4, v6, _ := strings.Cut(kernelTables(t, backendNFT), "---\n")
		if v4 != kernelWant4 || strings.Contains(v6, "PORTCULLIS") {
			t.Errorf("tables are\n%s---\n%s", v4, v6)
		}
	})
}
