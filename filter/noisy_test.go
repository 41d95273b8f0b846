package filter

import (
	"os"
	"strings"
	"testing"
)

func kernelNoisy(cfg *KernelConfig) { cfg.NoisyRate = 500 }

// TestNoisyRulesText reads the rules of the noisy queue back from the kernel: they
// stand before those that queue for all, and each packet meets one rate at most.
func TestNoisyRulesText(t *testing.T) {
	const want = `-m set --match-set SET src -m hashlimit HASHSRC -j NFQUEUE --queue-num 104
-m set --match-set SET src -j NFQUEUE --queue-balance 100:103 --queue-cpu-fanout
-m set --match-set SET dst -m set --match-set PODS src -m hashlimit HASHSRC -j NFQUEUE --queue-num 104
-m set --match-set SET dst -m set ! --match-set PODS src -m hashlimit HASHDST -j NFQUEUE --queue-num 104
-m set --match-set SET dst -j NFQUEUE --queue-balance 100:103 --queue-cpu-fanout
`
	hash := func(end string) string {
		return "--hashlimit-above 500/sec --hashlimit-burst 500 --hashlimit-mode " + end + "ip --hashlimit-name portcullis-" + end + "-500 " +
			"--hashlimit-htable-size 1024 --hashlimit-htable-max 262144 --hashlimit-htable-expire 10000"
	}
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend, kernelNoisy)
		k.SetPods(kernelAddrs("10.0.0.1 10.0.0.2 fd00::1"))
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
		for _, fam := range []family{4, 6} {
			var got strings.Builder
			for _, r := range parseListing(kernelRun(t, fam.binary()+"-"+backend+" -t mangle -S")).of("PORTCULLIS-FWD-1") {
				if strings.Contains(r, "NFQUEUE") {
					got.WriteString(r + "\n")
				}
			}
			want := strings.NewReplacer("SET", fam.set(), "PODS", fam.pods().name, "HASHSRC", hash("src"), "HASHDST", hash("dst")).Replace(want)
			if got.String() != want {
				t.Errorf("rules are\n%swant\n%s", got.String(), want)
			}
		}
		// A set that others empty is filled again, and nothing else is found wrong.
		kernelRun(t, "ipset flush portcullis-pods-4")
		repaired, err := k.Repair()
		kernelOK(t, err)
		if len(repaired) != 1 || !strings.Contains(repaired[0], "set portcullis-pods-4 lacked 2 members") {
			t.Errorf("repaired %q", repaired)
		}
		// Another rate is another table: the old one's would be kept.
		other := kernelNew(t, backend, func(cfg *KernelConfig) { cfg.NoisyRate = 700 })
		kernelOK(t, other.SetIsolated(kernelAddrs("10.0.0.1")))
		kernelOK(t, other.Install())
		if all := kernelTables(t, backend); !strings.Contains(all, "portcullis-src-700") || strings.Contains(all, "500") {
			t.Errorf("with another rate the tables are\n%s", all)
		}
		kernelOK(t, Cleanup(kernelQuiet(), DefaultMarkBits))
		if left := kernelRun(t, "ipset list -n"); left != "" {
			t.Errorf("cleanup left %s", left)
		}
	})
}

// TestNoisyFailOpen: what finds no noisy queue passes where the others let it.
func TestNoisyFailOpen(t *testing.T) {
	for _, r := range (gate{queueBase: 7, queues: 2, failOpen: true, markBits: 0x3000, noisyRate: 100, unknown: true}).forwardRules(4) {
		if rule := strings.Join(r, " "); strings.Contains(rule, "--queue-num 9") != strings.Contains(rule, "--queue-num 9 --queue-bypass") {
			t.Errorf("fail-open, but %q", rule)
		}
	}
}

// TestNoHashlimit: on a kernel without the match, whether that shows in the
// rehearsal or only when the rules are put in place, everything else is as ever, and
// the agent says what is missing.
func TestNoHashlimit(t *testing.T) {
	for _, rehearsed := range []bool{true, false} {
		kernelNetns(t)
		refuse := t.TempDir() + "/refuse"
		path := os.Getenv("PATH")
		kernelFakes(t, backendNFT, `case "$*" in *hashlimit*) test -e `+refuse+` && { echo "iptables: No chain/target/match by that name." >&2; exit 1; };; esac
exec REAL "$@"`)
		if rehearsed {
			kernelOK(t, os.WriteFile(refuse, nil, 0o644))
		}
		lg, said := kernelLog()
		k := kernelNew(t, backendNFT, kernelNoisy, func(cfg *KernelConfig) { cfg.Log = lg })
		kernelOK(t, os.WriteFile(refuse, nil, 0o644))
		kernelOK(t, k.Install())
		if got := kernelTables(t, backendNFT); got != kernelWant() {
			t.Errorf("rehearsed %v: tables are\n%s", rehearsed, got)
		}
		if n := strings.Count(said.String(), "modprobe xt_hashlimit"); n != 1 {
			t.Errorf("rehearsed %v: said %d times: %s", rehearsed, n, said)
		}
		repaired, err := k.Repair()
		kernelOK(t, err)
		if len(repaired) != 0 {
			t.Errorf("rehearsed %v: repaired %q", rehearsed, repaired)
		}
		kernelOK(t, k.Remove())
		t.Setenv("PATH", path)
	}
}
