package filter

import (
	"fmt"
	"strings"
	"testing"
)

// TestOnlyChangedRulesAreRead: with the nft backend rules are read when somebody has
// changed any, and no iptables command is run else, whatever becomes of the sets. Legacy
// iptables has nothing that would tell, so its rules are read each time.
func TestOnlyChangedRulesAreRead(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
		look := func(what string, want uint64, mends string) {
			t.Helper()
			before := CommandsRun()
			said, err := k.Repair()
			kernelOK(t, err)
			ran := CommandsRun() - before
			if ran != want && (mends == "" || ran < want) {
				t.Errorf("%s: %d commands were run, want %d", what, ran, want)
			}
			if (mends == "") != (len(said) == 0) || !strings.Contains(strings.Join(said, "; "), mends) {
				t.Errorf("%s: repaired %q, want %q", what, said, mends)
			}
		}
		unchanged := map[string]uint64{backendNFT: 0, backendLegacy: 2}[backend]
		look("the first look", 2, "")
		look("nothing has changed", unchanged, "")
		before := CommandsRun()
		for i := range 50 {
			kernelOK(t, k.SetIsolated(kernelAddrs(fmt.Sprintf("10.0.1.%d fd01::%d", i, i))))
		}
		if ran := CommandsRun() - before; ran != 0 {
			t.Errorf("50 changes of the sets ran %d commands", ran)
		}
		look("the sets have changed", unchanged, "")
		kernelRun(t, "ipset flush portcullis-4")
		look("a set was flushed", unchanged, "lacked 1 members")
		kernelBoth(t, backend, "IPT -A PREROUTING -j ACCEPT")
		look("somebody's own rules came", 2, "")
		look("nothing has changed again", unchanged, "")
		kernelBoth(t, backend, "IPT -F FORWARD")
		look("the jumps are gone", 2, "the jump from FORWARD was gone")
		look("after the repair", 2, "")
		look("nothing has changed since", unchanged, "")
		kernelRun(t, "ip6tables-"+backend+" -t mangle -F FORWARD")
		look("one family's jump is gone", 2, "IPv6: the jump from FORWARD was gone")
		kernelOK(t, k.Remove())
		look("after Remove", 2, "the rules were not in place")
	})
}

// TestNftGeneration: each change of a rule makes it another number, reading none.
func TestNftGeneration(t *testing.T) {
	kernelNetns(t)
	last, err := nftGeneration()
	kernelOK(t, err)
	kernelRun(t, "iptables-nft -t mangle -A FORWARD -j ACCEPT")
	for _, step := range []struct {
		script  string
		changes bool
	}{
		{"true", false},
		{"iptables-nft -t mangle -S", false},
		{"iptables-nft -t mangle -D FORWARD -j ACCEPT", true},
		{"ip6tables-nft -t filter -A INPUT -j ACCEPT", true},
		{"iptables-nft-save", false},
	} {
		before, err := nftGeneration()
		kernelOK(t, err)
		kernelRun(t, step.script)
		now, err := nftGeneration()
		kernelOK(t, err)
		if now == 0 || (now != before) != step.changes {
			t.Errorf("%s: from %d to %d", step.script, before, now)
		}
	}
	if now, err := nftGeneration(); err != nil || now == last {
		t.Errorf("still %d, %v", now, err)
	}
}
