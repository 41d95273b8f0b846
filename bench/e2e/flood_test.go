package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// floodTime is how long each flood lasts.
const floodTime = 3 * time.Second

// floodFrames are SYNs, or datagrams, of both families to a port that is closed to
// the attacker.
func (d *duel) floodFrames() [][]byte {
	a := &ammo{tag: []byte("flood"), port: 6379}
	return [][]byte{
		d.frame(d.toMAC, ip4(d.src4, d.dst4, 6, 0, nil, tcp(d.src4, d.dst4, 2, a))),
		d.frame(d.toMAC, ip6(d.src6, d.dst6, 6, 64, tcp(d.src6, d.dst6, 2, a))),
	}
}

// to gives a pod's addresses with a port.
func (w *world) to(who string, port uint16) (all []netip.AddrPort) {
	for _, ip := range w.lab.IPs(who) {
		all = append(all, netip.AddrPortFrom(ip, port))
	}
	return all
}

// metricSum sums the agent's metrics whose names, labels included, contain all of these
// words.
func (w *world) metricSum(words ...string) (sum float64) {
	w.Helper()
	text, err := w.get("/metrics")
	w.must(err)
lines:
	for l := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(l), " ")
		if strings.HasPrefix(l, "#") {
			continue
		}
		for _, word := range words {
			if !strings.Contains(name, word) {
				continue lines
			}
		}
		n, err := strconv.ParseFloat(value, 64)
		w.must(err)
		sum += n
	}
	return sum
}

// unaccounted waits until the log has written, or counted, every decision, and gives
// how many it hasn't when the patience is over.
func (w *world) unaccounted() int {
	w.Helper()
	missing := 0
	for end := time.Now().Add(patient); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		missing = int(w.metricSum("portcullis_decisions_total") - w.metricSum("portcullis_decision_log_records_total") -
			w.metricSum("portcullis_decision_log_lost_total") - w.metricSum("portcullis_decision_log_omitted_total") -
			w.metricSum("portcullis_decision_log_held_decisions"))
		if missing == 0 {
			return 0
		}
	}
	return missing
}

// rss gives the agent's resident memory in bytes.
func (w *world) rss() int {
	w.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", w.agent.Pid()))
	w.must(err)
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	w.must(err)
	return pages * os.Getpagesize()
}

// queueOf gives a queue's row of the kernel's table: number, owner, waiting, copy
// mode and range, dropped, dropped by the socket.
func (w *world) queueOf(number int) (dropped, userDropped int) {
	w.Helper()
	for l := range strings.Lines(w.command("cat", "/proc/thread-self/net/netfilter/nfnetlink_queue")) {
		f := strings.Fields(l)
		if n, _ := strconv.Atoi(f[0]); n == number {
			dropped, _ = strconv.Atoi(f[5])
			userDropped, _ = strconv.Atoi(f[6])
			return dropped, userDropped
		}
	}
	return 0, 0
}

// floodWorld has a pod that a/web may reach, and b/free not.
func floodWorld(t *testing.T, name string, args ...string) (*world, *duel) {
	w := gateWorld(t, name, lab.Routed)
	w.pod(lab.Routed, "a/other", 14, "app=other")
	w.apply("other.yaml", policy("a/other", `{podSelector: {matchLabels: {app: other}}, ingress: [{ports: [{port: 80}]}]}`))
	w.start(append([]string{"--decision-log-window=10s", "--queues=2"}, append(args, strings.Fields(os.Getenv("X"))...)...)...)
	w.expect(gateJudged)
	return w, newDuel(w, lab.Routed, "b/free", "a/db")
}

// TestFaultSYNFlood has one pod send SYNs that policy denies as fast as the machine
// can, to the same pod that others connect to meanwhile. Those get through: no
// connection needs a second SYN. What is too much is dropped from the flood's own
// queue, and the kernel's count of it is the agent's.
func TestFaultSYNFlood(t *testing.T) {
	w, d := floodWorld(t, "synflood")
	clients := role{Name: "connect", To: w.to("a/db", 80), Count: 1 << 20, Every: 2 * time.Millisecond, For: floodTime}
	idle := w.begin("a/web", clients)()
	before := w.rss()
	floodEnds := w.begin("b/free", role{Name: "flood", Frames: d.floodFrames(), Count: 1 << 30, For: floodTime + time.Second})
	time.Sleep(500 * time.Millisecond)
	busy := w.begin("a/web", clients)()
	flood := floodEnds()
	lost := w.unaccounted()
	grown := w.rss() - before
	dropped, userDropped := w.queueOf(102)
	note := fmt.Sprintf("%d SYNs in %s; p99 idle %s, flooded %s; judged %.0f, queue dropped %d, socket dropped %d; RSS %+d KiB; records lost and counted %.0f",
		flood.Sent, floodTime, idle.at(99), busy.at(99), w.metricSum("queue_packets_total", `queue="102"`), dropped, userDropped, grown>>10,
		w.metricSum("decision_log_lost_total"))
	chaos.Report(t, chaos.Row{Fault: "SYN flood from a denied pod", Load: "connections of another pod, one each 2 ms",
		Tried: len(idle.Took) + len(busy.Took) + busy.Failed + flood.Sent, Wrong: idle.Failed + busy.Failed, Lost: lost, Note: note})
	if flood.Sent < 10_000 || len(busy.Took) < 100 {
		t.Errorf("a flood of %d SYNs beside %d connections proves nothing", flood.Sent, len(busy.Took))
	}
	if slowest := busy.at(100); slowest > 900*time.Millisecond {
		t.Errorf("a connection took %s: its first SYN was lost", slowest)
	}
	if got := w.metricSum("queue_dropped_total", `queue="102"`); int(got) != dropped+userDropped {
		t.Errorf("the agent counts %.0f dropped packets, the kernel %d and %d", got, dropped, userDropped)
	}
	if got := w.metricSum("queue_dropped_total", `queue="100"`) + w.metricSum("queue_dropped_total", `queue="101"`); got != 0 {
		t.Errorf("%.0f packets were dropped from the queues of all", got)
	}
	if limit := max(10*idle.at(99), 100*time.Millisecond); busy.at(99) > limit {
		t.Errorf("the 99th percentile is %s, beside %s without a flood", busy.at(99), idle.at(99))
	}
	if grown > 128<<20 {
		t.Errorf("the agent has grown by %d MiB", grown>>20)
	}
	w.expect(gateJudged)
}
