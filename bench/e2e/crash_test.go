package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// away is how long no agent runs in the tests below: long enough for a TCP client to
// have tried again.
const away = 1500 * time.Millisecond

// underWay is more than it takes to open a connection whose verdict is out.
const underWay = 200 * time.Millisecond

// TestKilledUnderLoad kills a fail-closed agent under a load of new connections:
// established ones go on, and of the new ones that policy allows none is lost and
// none gets through until the next agent has judged it.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "crash", lab.Routed)
	w.start()
	held := w.hold("a/web", "a/db", 80)
	allowed, denied := w.load("a/web", "a/db", 80, 300, 3*patient), w.load("b/free", "a/db", 80, 30, lab.Timeout)
	stopDenied := w.besiege("b/free", "a/db", 5000)
	opened := 0
	for range 3 {
		time.Sleep(time.Second)
		_ = w.stop(syscall.SIGKILL)
		time.Sleep(underWay)
		before := allowed.take()
		w.lives(held, "no agent ran")
		time.Sleep(away)
		if through := allowed.take(); len(through) > 0 {
			t.Errorf("%d connections were opened while nobody judged", len(through))
		}
		opened += connections(before)
		w.log += "-next"
		w.start()
	}
	time.Sleep(time.Second)
	allowed.stop()
	denied.stop()
	sent, arrived := stopDenied()
	w.lives(held, "the next agents had come")
	w.must(w.stop(syscall.SIGTERM))
	t.Logf("killed 3 times, away for %s each\nallowed connections: %s\ndenied connections: %s\ndenied datagrams: %d sent, %d arrived", away+underWay, allowed, denied, sent, arrived)
	w.must(allowed.err)
	last := allowed.take()
	if allowed.failed.Load() > 0 || allowed.resent.Load() < 100 || opened == 0 || len(last) == 0 {
		t.Error("allowed connections failed, or none waited")
	}
	if denied.opened.Load() > 0 || denied.failed.Load() < 50 || arrived > 0 || sent < 500 {
		t.Error("denied ones got through")
	}
	// The logs of killed agents lack their last lines; the last one's is whole.
	missing := w.unjudged(last, "db", 80, w.log)
	chaos.Report(t, chaos.Row{Fault: "kill -9 three times, fail-closed", Load: "330 new connections/s",
		Tried: int(allowed.tried.Load()+denied.tried.Load()) + sent, Wrong: int(allowed.failed.Load()+denied.opened.Load()) + arrived, Lost: missing,
		Note: fmt.Sprintf("%d waited for the next agent", allowed.resent.Load())})
	if missing > 0 {
		t.Errorf("%d of the %d connections opened since the last agent came have no record", missing, connections(last))
	}
}

// unjudged counts the connections that have no record of an allow in these logs.
func (w *world) unjudged(ends map[netip.AddrPort]int, pod string, port uint16, logs ...string) (missing int) {
	w.Helper()
	judged := w.judged(pod, port, logs...)
	for from, n := range ends {
		missing += max(0, n-judged[from])
	}
	return missing
}

func connections(ends map[netip.AddrPort]int) (n int) {
	for _, of := range ends {
		n += of
	}
	return n
}

// TestFailOpenUnderLoad kills a fail-open agent under a load of new connections: they
// pass while nobody listens, those that policy denies too, and are judged again as soon
// as the next agent has come.
func TestFailOpenUnderLoad(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "crash-open", lab.Routed)
	w.start("--fail-open")
	held := w.hold("a/web", "a/db", 80)
	allowed, denied := w.load("a/web", "a/db", 80, 300, 3*patient), w.load("b/free", "a/db", 80, 100, lab.Timeout)
	passed := 0
	for i := range 3 {
		time.Sleep(time.Second)
		if before := denied.take(); len(before) > 0 {
			t.Errorf("%d connections that policy denies were opened under an agent", len(before))
		}
		_ = w.stop(syscall.SIGKILL)
		time.Sleep(away)
		now := connections(denied.take())
		if now < 50 {
			t.Errorf("only %d connections passed an open gate in %s", now, away)
		}
		passed += now
		w.lives(held, "no agent ran")
		w.log += "-next"
		w.start(fmt.Sprintf("--fail-open=%v", i < 2), "--queues=1")
		time.Sleep(underWay)
		denied.take()
		allowed.take()
	}
	time.Sleep(time.Second)
	allowed.stop()
	denied.stop()
	w.lives(held, "the next agents had come")
	w.must(w.stop(syscall.SIGTERM))
	t.Logf("killed 3 times, away for %s each\nallowed connections: %s\nconnections that policy denies: %s, of them %d while no agent ran", away, allowed, denied, passed)
	w.must(allowed.err)
	w.must(denied.err)
	if allowed.failed.Load() > 0 {
		t.Error("allowed connections failed")
	}
	late := denied.take()
	chaos.Report(t, chaos.Row{Fault: "kill -9 three times, fail-open", Load: "400 new connections/s",
		Tried: int(allowed.tried.Load() + denied.tried.Load()), Wrong: int(allowed.failed.Load()) + len(late), Lost: chaos.Unknown,
		Note: fmt.Sprintf("%d passed while nobody judged, as they should", passed)})
	if len(late) > 0 || denied.failed.Load() < 50 {
		t.Errorf("%d connections that policy denies were opened under the last agent", len(late))
	}
	last := allowed.take()
	if missing := w.unjudged(last, "db", 80, w.log); missing > 0 || len(last) == 0 {
		t.Errorf("%d of the %d connections opened under the last agent have no record", missing, connections(last))
	}
}

// TestStuckAgent stops an agent, which so listens without ever answering, until its
// queue is full: what comes then is dropped, or with --fail-open passes, and the kernel
// counts it. Set going again it judges what has waited.
func TestStuckAgent(t *testing.T) {
	t.Parallel()
	for _, open := range []bool{false, true} {
		t.Run(fmt.Sprintf("fail-open-%v", open), func(t *testing.T) {
			t.Parallel()
			w := gateWorld(t, fmt.Sprintf("stuck-%v", open), lab.Routed)
			w.start(fmt.Sprintf("--fail-open=%v", open), "--queues=1", "--queue-length=16")
			n, err := w.lab.CountUDP("a/db", 5000)
			w.must(err)
			w.must(w.agent.Signal(syscall.SIGSTOP))
			const sent = 100
			w.must(w.lab.Do("b/free", func() error {
				for range sent {
					if err := sendOne(netip.AddrPortFrom(w.lab.IP4("a/db"), 5000)); err != nil {
						return err
					}
				}
				return nil
			}))
			time.Sleep(lab.Timeout)
			passed := n.Count()
			w.must(w.agent.Signal(syscall.SIGCONT))
			// The signal takes effect a little later: some are judged before.
			var judged, dropped int
			w.until("all are accounted for", func() error {
				judged, dropped = 0, int(w.metric("portcullis_queue_dropped_total"))
				for _, d := range w.decisions() {
					if d.Verdict == "deny" && d.Dst.Port == 5000 {
						judged++
					}
				}
				if judged+dropped+passed != sent {
					return fmt.Errorf("%d judged, %d dropped, %d passed, of %d", judged, dropped, passed, sent)
				}
				return nil
			})
			if open != (dropped == 0) || open != (passed > 0) || judged < 16 || n.Count() != passed {
				t.Errorf("of %d datagrams, 16 of which fit the queue, %d were judged, %d dropped, %d passed, %d in all", sent, judged, dropped, passed, n.Count())
			}
			w.expect(gateJudged)
		})
	}
}

// TestStartsWithTheOldState: no agent runs while the policy is made stricter. The
// next one has the new policy in force before it lets anything in.
func TestStartsWithTheOldState(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "stricter", lab.Routed)
	w.start()
	allowed := w.load("a/web", "a/db", 80, 200, lab.Timeout)
	w.until("connections are opened", func() error {
		if allowed.opened.Load() < 50 {
			return errNotYet
		}
		return nil
	})
	_ = w.stop(syscall.SIGKILL)
	w.apply("db.yaml", strings.Replace(policy("a/db", denyIngress), "podSelector: {}", "podSelector: {matchLabels: {app: db}}", 1))
	time.Sleep(underWay)
	before := allowed.opened.Load()
	w.start()
	w.settle("deny tcp a/web a/db:80")
	allowed.stop()
	if now := allowed.opened.Load(); now != before {
		t.Errorf("%d connections were let in by a policy that was gone", now-before)
	}
}
