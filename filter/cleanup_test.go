package filter

import (
	"regexp"
	"strings"
	"testing"
)

// kernelState gives everything that Cleanup may touch, of all four commands.
// Of nftables the empty base chains are left out, which iptables-nft makes on
// its first rule and leaves.
func kernelState(t *testing.T) string {
	t.Helper()
	all := kernelRun(t, `for c in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
		echo "$c"; $c-save 2>/dev/null; done; ipset list -n`)
	return regexp.MustCompile(`(?m)^(#.*|\*.*|COMMIT|:[A-Z]+ ACCEPT.*)\n`).ReplaceAllString(all, "")
}

// TestCleanup leaves everything as it was before, whichever backend was used,
// twice over, somebody else's rules and sets included.
func TestCleanup(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		kernelRun(t, `ipset create theirs hash:ip
			for c in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
			$c -t mangle -N THEIRS; $c -t mangle -A FORWARD -j THEIRS; $c -A INPUT -m comment --comment PORTCULLIS-FWD-1 -j ACCEPT; done`)
		before := kernelState(t)
		if !strings.Contains(before, "THEIRS") || !strings.Contains(before, "theirs") {
			t.Fatalf("the state lacks what was put there:\n%s", before)
		}
		k := kernelNew(t, backend)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
		// Left-overs of an earlier run with the other backend.
		kernelBoth(t, otherBackend(backend), "IPT -N PORTCULLIS-FWD-3; IPT -A FORWARD -j PORTCULLIS-FWD-3")
		if kernelState(t) == before {
			t.Fatal("nothing was installed")
		}
		for _, way := range []string{"once", "twice"} {
			kernelOK(t, Cleanup(kernelQuiet(), DefaultMarkBits))
			if after := kernelState(t); after != before {
				t.Errorf("cleaned up %s:\n%s\nbefore:\n%s", way, after, before)
			}
		}
	})
}

// TestCleanupOfNothing: neither a fresh namespace nor missing commands are an
// error, and no legacy table comes into being.
func TestCleanupOfNothing(t *testing.T) {
	kernelNetns(t)
	kernelOK(t, Cleanup(kernelQuiet(), DefaultMarkBits))
	if legacyTableExists(4, mangle) || legacyTableExists(6, mangle) {
		t.Error("cleanup made a legacy table")
	}
	kernelPathOf(t, "")
	kernelOK(t, Cleanup(kernelQuiet(), DefaultMarkBits))
	if err := Cleanup(kernelQuiet(), 0x7); err == nil {
		t.Error("three mark bits are no error")
	}
}

// TestRemove opens the gate, and the Kernel may install again.
func TestRemove(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend)
		for range 2 {
			kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
			kernelOK(t, k.Install())
			kernelCheckShut(t, "installed", backend)
			kernelOK(t, k.Remove())
			if got := strings.ToLower(kernelState(t)); strings.Contains(got, "portcullis") {
				t.Errorf("removed, but there is\n%s", got)
			}
		}
	})
}
