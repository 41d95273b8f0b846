package e2e

import (
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/bench/lab"
)

// repairedWithin is how soon what others have altered must be as it was.
const repairedWithin = 5 * time.Second

// damages are what people and programs do to the rules and sets of a running agent, and
// what the gate is like until that is mended: open to whom policy denies, shut, or as
// it was, since nothing that matters was touched. DUMP is of before the agent's start,
// OLD of when an agent with other queues had run, ADDR4 and ADDR6 are a/db's.
var damages = []struct{ name, script, between string }{
	{"filter", "iptables -w -F; ip6tables -w -F", "as it was"},
	{"flush", "iptables -w -t mangle -F; ip6tables -w -t mangle -F", "open"},
	{"delete", "for c in iptables ip6tables; do printf '*mangle\\nCOMMIT\\n' | $c-restore -w; done", "open"},
	{"jump", "iptables -w -t mangle -F FORWARD; ip6tables -w -t mangle -F FORWARD", "open"},
	{"chain", "for c in iptables ip6tables; do $c -w -t mangle -F $($c -w -t mangle -S FORWARD | sed -n 's/.*-j \\(PORTCULLIS-[^ ]*\\).*/\\1/p'); done", "open"},
	{"restore", "iptables-restore <DUMP.4; ip6tables-restore <DUMP.6", "open"},
	{"restore-old", "iptables-restore <OLD.4; ip6tables-restore <OLD.6", "shut"},
	{"flush-sets", "ipset flush", "open"},
	{"member", "ipset del portcullis-4 ADDR4; ipset del portcullis-6 ADDR6", "open"},
	// The kernel lets go of a set a little after the rules, and the repair may be faster.
	{"destroy-sets", `for i in $(seq 50); do
		for c in iptables ip6tables; do printf '*mangle\nCOMMIT\n' | $c-restore -w; done
		ipset destroy && exit; sleep 0.0$((i % 10)); done; exit 1`, "open"},
}

// TestRepair does all that to a running agent under traffic: within five seconds the
// gate is as policy has it, which is counted and logged. Connections that policy allows
// get through all the time.
func TestRepair(t *testing.T) {
	t.Parallel()
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			t.Parallel()
			w := gateWorld(t, "repair-"+d.name, lab.Routed)
			// An old agent leaves rules with other queues and the same sets.
			dir := w.TempDir()
			dump := func(name string) {
				w.command("sh", "-ec", "cd "+dir+"; iptables-save >"+name+".4; ip6tables-save >"+name+".6")
			}
			for _, c := range []string{"iptables", "ip6tables"} {
				w.command(c, "-w", "-t", "mangle", "-A", "PREROUTING", "-m", "comment", "--comment", "theirs", "-j", "ACCEPT")
			}
			dump("dump")
			w.start("--queue-base=300")
			dump("old")
			_ = w.stop(syscall.SIGKILL)
			w.start()
			script := strings.NewReplacer("DUMP", filepath.Join(dir, "dump"), "OLD", filepath.Join(dir, "old"),
				"ADDR4", w.lab.IP4("a/db").String(), "ADDR6", w.lab.IP6("a/db").String()).Replace(d.script)

			denied, err := w.lab.CountUDP("a/db", 5001)
			w.must(err)
			allowed := w.load("a/web", "a/db", 80, 100, settled)
			stop := w.besiege("b/free", "a/db", 5000)
			before := w.metric("portcullis_repairs_total")
			w.command("sh", "-ec", script)
			damaged := time.Now()
			if d.between == "as it was" {
				time.Sleep(repairedWithin)
			} else {
				w.untilWithin(repairedWithin, "the repair is counted", func() error {
					if w.metric("portcullis_repairs_total") == before {
						return errNotYet
					}
					return nil
				})
				w.until("the repair is logged", func() error {
					if !strings.Contains(w.agent.Output(), "kernel state repaired") {
						return errNotYet
					}
					return nil
				})
			}
			took := time.Since(damaged)
			w.settle(gateJudged) // there may be another repair to come, of what was altered after the first
			w.expect(gateJudged)
			w.must(w.lab.Do("b/free", func() error { return sendOne(netip.AddrPortFrom(w.lab.IP4("a/db"), 5001)) }))
			sent, arrived := stop()
			allowed.stop()
			t.Logf("a first repair after %s; of %d denied datagrams %d arrived; allowed connections: %s", took.Round(time.Millisecond), sent, arrived, allowed)
			if allowed.failed.Load() > 0 || allowed.opened.Load() == 0 {
				t.Error("allowed connections failed")
			}
			if d.between != "open" && arrived > 0 {
				t.Errorf("%d denied datagrams arrived; the gate was to be %s", arrived, d.between)
			}
			if denied.Count() > 0 {
				t.Error("the gate is still open")
			}
			if now := w.metric("portcullis_repairs_total"); (now == before) != (d.between == "as it was") {
				t.Errorf("%v repairs are counted", now-before)
			}
			w.checkOneGate()
		})
	}
}
