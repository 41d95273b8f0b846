package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// settled ends what hangs where agents wait for each other, or the kernel for its own
// tidying up: each iptables command may take a while on a machine that is busy.
const settled = time.Minute

// loadWorld is gateWorld in which a/web may reach port 5001 too, by UDP.
func loadWorld(t *testing.T, name string, mode lab.Mode) *world {
	w := gateWorld(t, name, mode)
	w.apply("datagrams.yaml", policy("a/datagrams", `{podSelector: {matchLabels: {app: db}}, `+
		`ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5001, protocol: UDP}]}]}`))
	return w
}

// succeed starts an agent with a decision log of its own beside the one that runs,
// which must end, all being well, having said so in one line, and waits until the
// new one is ready.
func (w *world) succeed(args ...string) {
	w.Helper()
	old := w.agent
	w.log = filepath.Join(w.TempDir(), "decisions.log")
	w.launch(args...)
	if err := old.Wait(settled); err != nil {
		w.Fatalf("the old agent: %v\n%s\nthe new one:\n%s", err, old.Output(), w.agent.Output())
	}
	if said := strings.Count(old.Output(), "handed over to a newer agent"); said != 1 {
		w.Errorf("the old agent tells %d times that it has handed over:\n%s", said, old.Output())
	}
	w.untilWithin(settled, "the new agent is ready", func() error {
		_, err := w.get("/readyz")
		return err
	})
}

// judged counts the allows in decision logs' files that are about TCP connections to
// a pod's port, by where they come from.
func (w *world) judged(pod string, port uint16, logs ...string) map[netip.AddrPort]int {
	w.Helper()
	all := map[netip.AddrPort]int{}
	for _, log := range logs {
		b, err := os.ReadFile(log)
		w.must(err)
		countJudged(w, string(b), pod, port, all)
	}
	return all
}

// countJudged is judged for a decision log's text; lines that are no decisions don't
// count.
func countJudged(w *world, text, pod string, port uint16, into map[netip.AddrPort]int) {
	w.Helper()
	for text := range strings.Lines(text) {
		var d struct {
			Verdict, Protocol string
			Src, Dst          struct {
				IP   netip.Addr
				Pod  string
				Port uint16
			}
		}
		w.must(json.Unmarshal([]byte(text), &d))
		if d.Verdict == "allow" && d.Protocol == "TCP" && d.Dst.Pod == pod && d.Dst.Port == port {
			into[netip.AddrPortFrom(d.Src.IP, d.Src.Port)]++
		}
	}
}

// TestHandover replaces the agent several times under a load of new connections and
// datagrams: each gets through without a packet sent again, each was judged by one of
// the agents, and of those that policy denies none gets through.
func TestHandover(t *testing.T) {
	bothModes(t, "handover", func(t *testing.T, name string, mode lab.Mode) {
		w := loadWorld(t, name, mode)
		w.start()
		logs := []string{w.log}
		var handed []string
		held := w.hold("a/web", "a/db", 80)
		allowed := w.load("a/web", "a/db", 80, 1000, 3*patient)
		denied := w.load("b/free", "a/db", 80, 50, lab.Timeout)
		stop, stopDenied := w.datagrams("a/web", "a/db", 5001, 100), w.besiege("b/free", "a/db", 5000)
		for _, args := range [][]string{{}, {"--queues=3"}, {"--queue-base=300", "--queues=1"}, {"--fail-open"}, {}} {
			time.Sleep(time.Second / 2)
			handed = append(handed, time.Now().UTC().Format("15:04:05.000"))
			w.succeed(args...)
			handed = append(handed, time.Now().UTC().Format("15:04:05.000"))
			logs = append(logs, w.log)
		}
		allowed.stop()
		denied.stop()
		sent, arrived := stop()
		sentDenied, arrivedDenied := stopDenied()
		w.lives(held, "the agents were replaced")
		w.checkOneGate()
		w.must(w.stop(syscall.SIGTERM))
		t.Logf("%d hand-overs\nallowed connections: %s\ndenied connections: %s\ndatagrams: %d sent, %d arrived; denied: %d sent, %d arrived",
			len(logs)-1, allowed, denied, sent, arrived, sentDenied, arrivedDenied)
		w.must(allowed.err)
		w.must(denied.err)
		if allowed.failed.Load() > 0 || allowed.opened.Load() < 500 || sent != arrived || sent < 200 {
			t.Error("allowed connections failed, or datagrams were lost")
		}
		if denied.opened.Load() > 0 || arrivedDenied > 0 || denied.failed.Load() < 50 || sentDenied < 100 {
			t.Error("denied ones got through")
		}
		ends := allowed.take()
		missing := w.unjudged(ends, "db", 80, logs...)
		chaos.Report(t, chaos.Row{Fault: fmt.Sprintf("%d hand-overs to a new agent, %s", len(logs)-1, mode), Load: "1,000 new connections/s, 200 datagrams/s",
			Tried: int(allowed.tried.Load()+denied.tried.Load()) + sent + sentDenied,
			Wrong: int(allowed.failed.Load()+denied.opened.Load()) + sent - arrived + arrivedDenied, Lost: missing,
			Note: fmt.Sprintf("%d had to send a SYN again", allowed.resent.Load())})
		if missing > 0 {
			t.Errorf("%d of %d connections have no record in any log", missing, allowed.opened.Load())
			judged := w.judged("db", 80, logs...)
			for from, n := range ends {
				if n > judged[from] {
					t.Errorf("from %s %d times, judged %d times; the last began at %s; %v", from, n, judged[from], allowed.when[from].UTC().Format("15:04:05.000"), handed)
				}
			}
		}
	})
}

// setSlot finds what tells one agent's sets from another's: portcullis-4-1.
var setSlot = regexp.MustCompile(`[46](-\d+)?$`)

// checkOneGate shows that one gate's rules and sets are all that is there. The sets
// of agents that have ended go with the next repair.
func (w *world) checkOneGate() {
	w.Helper()
	w.untilWithin(settled, "there is one gate", func() error {
		chains := 0
		for _, r := range w.rules() {
			if strings.Contains(r, ": :PORTCULLIS-") {
				chains++
			}
		}
		sets, slots := strings.Fields(w.command("ipset", "list", "-n")), map[string]bool{}
		for _, name := range sets {
			slots[setSlot.FindStringSubmatch(name)[1]] = true
		}
		if chains != 4 || len(slots) != 1 {
			return fmt.Errorf("%d chains, sets %q, rules %q", chains, sets, w.rules())
		}
		return nil
	})
}

// TestStartedTogether starts agents at once where none runs and where one does: when
// all has settled exactly one is left, the others have ended without an error, and
// nothing that is denied got through.
func TestStartedTogether(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "together", lab.Routed)
	w.start1("--http=")
	stop := w.besiege("b/free", "a/db", 5000)
	for range 3 {
		running := []*lab.Process{w.agent}
		for i := range 3 {
			w.launch("--http=", fmt.Sprintf("--queues=%d", 1+i))
			running = append(running, w.agent)
		}
		var left []*lab.Process
		w.untilWithin(settled, "one agent is left", func() error {
			left = nil
			for _, p := range running {
				select {
				case <-p.Done():
					if err := p.Wait(patient); err != nil {
						w.Fatalf("an agent: %v: %s", err, p.Output())
					}
				default:
					left = append(left, p)
				}
			}
			if len(left) != 1 {
				var said strings.Builder
				for _, p := range left {
					said.WriteString("\n" + p.Output())
				}
				return fmt.Errorf("%d run:%s", len(left), said.String())
			}
			return nil
		})
		w.agent = left[0]
		w.settle(gateJudged)
		w.expect(gateJudged)
	}
	if sent, arrived := stop(); arrived > 0 || sent < 100 {
		t.Errorf("of %d datagrams that policy denies, %d arrived", sent, arrived)
	}
	w.checkOneGate()
}

// TestStoppedWhileReplaced ends an old agent by SIGTERM just when a new one takes
// over: whichever comes first, the new one's gate stays, even if the old one is
// fail-open and would have removed its own.
func TestStoppedWhileReplaced(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "stopped", lab.Routed)
	for i := range 6 {
		w.start("--fail-open")
		old := w.agent
		w.launch("--http=127.0.0.1:9354")
		w.untilWithin(settled, "the new agent enforces", func() error {
			if !strings.Contains(w.agent.Output(), "enforcing") {
				return errNotYet
			}
			return nil
		})
		time.Sleep(time.Duration(i) * 30 * time.Millisecond)
		_ = old.Signal(syscall.SIGTERM) // it may have gone by itself
		w.must(old.Wait(settled))
		w.expect("deny tcp b/free a/db:80\nallow tcp a/web a/db:80")
		time.Sleep(3 * time.Second / 2) // a look of the old one would be due
		w.expect(gateJudged)
		w.must(w.stop(syscall.SIGTERM))
	}
}

// TestOldAgentMendsWhatANewOneLeft kills new agents at whatever moment of taking over:
// the old one, if it hasn't handed over yet, has its gate back soon, and otherwise the
// next one finds its way.
func TestOldAgentMendsWhatANewOneLeft(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "halfway", lab.Routed)
	w.start1("--http=")
	stop := w.besiege("b/free", "a/db", 5000)
	old, mended := w.agent, 0
	for i := range 12 {
		w.launch("--http=")
		time.Sleep(time.Duration(i*40) * time.Millisecond)
		_ = w.stop(syscall.SIGKILL)
		select {
		case <-old.Done(): // it had handed over
			w.must(old.Wait(settled))
			w.start1("--http=")
			old = w.agent
		case <-time.After(time.Second / 2):
			mended++
			w.agent = old
		}
		w.settle(gateJudged)
	}
	if mended == 0 {
		t.Error("no agent was killed before it had taken over")
	}
	if sent, arrived := stop(); arrived > 0 || sent < 100 {
		t.Errorf("of %d datagrams that policy denies, %d arrived", sent, arrived)
	}
	t.Logf("the old agent went on %d times", mended)
}

// start1 runs an agent without HTTP and waits until it enforces.
func (w *world) start1(args ...string) {
	w.Helper()
	w.launch(args...)
	w.untilWithin(settled, "the agent enforces", func() error {
		if !strings.Contains(w.agent.Output(), "enforcing") {
			return errNotYet
		}
		return nil
	})
}

// TestStandby has the old agent wait, as a DaemonSet's must, and take the gate back
// when the new one is gone for good. Told to end, it leaves the new one's gate alone.
func TestStandby(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "standby", lab.Routed)
	w.start("--standby", "--pod-uid=one", "--fail-open")
	old := w.agent
	probe := func(pod string) error {
		_, err := w.lab.Command(context.Background(), lab.Node, binary, "probe", "--pod-uid", pod)
		return err
	}
	w.must(probe("one"))
	w.launch("--standby", "--pod-uid=two")
	if err := probe("two"); err == nil {
		t.Error("the new agent's probe is answered before it can have taken over")
	}
	w.untilWithin(settled, "the new agent answers", func() error { return probe("two") })
	if err := probe("one"); err == nil {
		t.Error("the old agent's probe is answered by the new one")
	}
	w.untilWithin(settled, "the old agent stands by", func() error {
		if !strings.Contains(old.Output(), "standing by") {
			return errNotYet
		}
		return nil
	})
	onSocket := func(who string) {
		w.untilWithin(settled, who+" answers on the socket", func() error {
			if _, stderr, code := w.asked("top", "--once", "--interval", "100ms", "--socket", w.socket); code != 0 {
				return errors.New(stderr)
			}
			return nil
		})
	}
	onSocket("the new agent")
	out, err := w.lab.Command(context.Background(), lab.Node, binary, "cleanup")
	if err == nil {
		t.Errorf("cleanup beside two agents: %s", out)
	}
	w.expect(gateJudged)
	w.must(old.Signal(syscall.SIGHUP))
	_ = w.stop(syscall.SIGKILL)
	w.agent = old
	w.untilWithin(3*patient, "the old agent has the gate back", func() error {
		_, err := w.get("/readyz")
		return err
	})
	w.must(probe("one"))
	w.expect(gateJudged)
	onSocket("the old agent")

	w.launch("--standby", "--pod-uid=three")
	w.untilWithin(settled, "the third agent answers", func() error { return probe("three") })
	w.must(old.Signal(syscall.SIGTERM))
	w.must(old.Wait(settled))
	w.expect(gateJudged)
}
