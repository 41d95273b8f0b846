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

const (
	// floodTime is how long each flood lasts.
	floodTime = 3 * time.Second
	// floodRounds is how often latencies are compared at most.
	floodRounds = 4
)

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
		missing = int(w.metricSum("portcullis_decisions_total") + w.metricSum("portcullis_revoked_connections_total") -
			w.metricSum("portcullis_decision_log_records_total") - w.metricSum("portcullis_decision_log_lost_total") - w.metricSum("portcullis_decision_log_omitted_total") -
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
	w.start(append([]string{"--decision-log-window=10s", "--queues=2"}, args...)...)
	w.expect(gateJudged)
	return w, newDuel(w, lab.Routed, "b/free", "a/db")
}

// beside gives what clients find while a pod floods.
func (w *world) beside(flooder string, frames [][]byte, clients role) (found, found) {
	w.Helper()
	floodEnds := w.begin(flooder, role{Name: "flood", Frames: frames, Count: 1 << 30, For: clients.For + time.Second})
	time.Sleep(500 * time.Millisecond)
	return w.begin("a/web", clients)(), floodEnds()
}

// droppedInKernel is beside with all that is sent to a port dropped by the node's first
// rule after conntrack, so that no gate sees it: what the flood costs everybody because
// the machine has to carry it.
func (w *world) droppedInKernel(port, flooder string, frames [][]byte, clients role) (found, found) {
	w.Helper()
	for _, iptables := range []string{"iptables", "ip6tables"} {
		rule := []string{"PREROUTING", "-p", "tcp", "--dport", port, "-j", "DROP"}
		w.command(append([]string{iptables, "-w", "-t", "mangle", "-A"}, rule...)...)
		defer w.command(append([]string{iptables, "-w", "-t", "mangle", "-D"}, rule...)...)
	}
	return w.beside(flooder, frames, clients)
}

// TestFaultSYNFlood has one pod send SYNs that policy denies as fast as the machine
// can, to the same pod that others connect to meanwhile. Those get through: no
// connection needs a second SYN, and they take less than ten times as long as without a
// flood, or little longer than beside a flood that the kernel drops by itself. What is too
// much is dropped from the flood's own queue, and the kernel's count of it is the agent's.
func TestFaultSYNFlood(t *testing.T) {
	w, d := floodWorld(t, "synflood")
	clients := role{Name: "connect", To: w.to("a/db", 80), Count: 1 << 20, Every: 2 * time.Millisecond, For: floodTime}
	before := w.rss()
	var idle, ungated, busy, flood found
	var limit time.Duration
	sent := 0
	// All three are measured in one go, and again when the machine had other things to do.
	for range floodRounds {
		idle = w.begin("a/web", clients)()
		ungated, _ = w.droppedInKernel("6379", "b/free", d.floodFrames(), clients)
		busy, flood = w.beside("b/free", d.floodFrames(), clients)
		sent += flood.Sent
		if limit = max(10*idle.at(99), 3*ungated.at(99)); busy.at(99) <= limit {
			break
		}
	}
	lost := w.unaccounted()
	grown := w.rss() - before
	dropped, userDropped := w.queueOf(102)
	note := fmt.Sprintf("%d SYNs in %s; p99 idle %s, the same flood dropped by one rule %s, flooded %s; judged %.0f, queue dropped %d, socket dropped %d; RSS %+d KiB; records lost and counted %.0f",
		flood.Sent, floodTime+time.Second, idle.at(99), ungated.at(99), busy.at(99), w.metricSum("queue_packets_total", `queue="102"`), dropped, userDropped, grown>>10,
		w.metricSum("decision_log_lost_total"))
	chaos.Report(t, chaos.Row{Fault: "SYN flood from a denied pod", Load: "connections of another pod, one each 2 ms",
		Tried: len(idle.Took) + len(busy.Took) + busy.Failed + sent, Wrong: idle.Failed + busy.Failed, Lost: lost, Note: note})
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
	if busy.at(99) > limit {
		t.Errorf("the 99th percentile is %s, beside %s without a flood and %s with one that the kernel drops", busy.at(99), idle.at(99), ungated.at(99))
	}
	if grown > 128<<20 {
		t.Errorf("the agent has grown by %d MiB", grown>>20)
	}
	w.expect(gateJudged)
}

// TestFaultSYNFloodFailOpen floods behind a gate that is to let pass what its queues
// can't hold, and nothing else. The kernel has no count of what it lets pass that
// way: it is what the rules have handed to the queues less what came out of them.
func TestFaultSYNFloodFailOpen(t *testing.T) {
	w, d := floodWorld(t, "synopen", "--fail-open", "--queue-length=20")
	const count = "iptables -t mangle -A PREROUTING -p tcp --dport 6379 --syn"
	_, err := w.lab.Command(t.Context(), "a/db", strings.Fields(count)...)
	w.must(err)
	queued, judged := w.handedToQueues(), w.metricSum("queue_packets_total")
	floodEnds := w.begin("b/free", role{Name: "flood", Frames: d.floodFrames()[:1], Count: 1 << 30, For: floodTime})
	clients := w.begin("a/web", role{Name: "connect", To: w.to("a/db", 80), Count: 1 << 20, Every: 5 * time.Millisecond, For: floodTime})()
	flood := floodEnds()
	lost := w.unaccounted()
	passed := w.handedToQueues() - queued - int(w.metricSum("queue_packets_total")-judged)
	out, err := w.lab.Command(t.Context(), "a/db", "iptables-save", "-t", "mangle", "-c")
	w.must(err)
	arrived := packetsOf(out, "--dport 6379")
	chaos.Report(t, chaos.Row{Fault: "SYN flood from a denied pod, fail-open", Load: "connections of another pod, one each 5 ms",
		Tried: len(clients.Took) + clients.Failed + flood.Sent, Wrong: clients.Failed, Lost: lost,
		Note: fmt.Sprintf("%d SYNs, %d found the queue full and passed; p99 %s", flood.Sent, passed, clients.at(99))})
	// A port that comes up twice may count as established.
	if off := max(arrived-passed, passed-arrived); off > passed/100 {
		t.Errorf("%d SYNs passed, and %d arrived", passed, arrived)
	}
	if passed == 0 || flood.Sent-passed < 100 {
		t.Errorf("of %d SYNs %d passed: the queue wasn't full, or nothing was judged", flood.Sent, passed)
	}
}

// handedToQueues sums what the rules that queue have counted.
func (w *world) handedToQueues() int {
	w.Helper()
	return packetsOf(w.command("iptables-save", "-t", "mangle", "-c")+w.command("ip6tables-save", "-t", "mangle", "-c"), "-j NFQUEUE")
}

// packetsOf sums the packets of the rules, as iptables-save counts them, that
// contain a text.
func packetsOf(save, text string) (sum int) {
	for line := range strings.Lines(save) {
		var packets, octets int
		if n, _ := fmt.Sscanf(line, "[%d:%d]", &packets, &octets); n == 2 && strings.Contains(line, text) {
			sum += packets
		}
	}
	return sum
}

// scanning sends to all ports of a pod, in both families, from a pod that may reach
// none of them, while another goes on to connect where it may; it gives the share of
// the latter's decisions that came from the cache.
func (w *world) scanning(d *duel, r role) (clients found, sent int, hits float64) {
	w.Helper()
	steady := role{Name: "connect", To: w.to("a/db", 80), Count: 300, Every: 5 * time.Millisecond, For: patient}
	w.begin("a/web", steady)() // the cache is warm
	w.unaccounted()
	allowed, cached := w.allows()
	ends := w.begin(d.from, r)
	clients = w.begin("a/web", steady)()
	sent = ends().Sent
	w.unaccounted()
	allowedThen, cachedThen := w.allows()
	return clients, sent, float64(cachedThen-cached) / float64(allowedThen-allowed)
}

// allows counts the allows in the log, and those that came from the cache, without
// the care of decisions: a scan leaves a hundred thousand lines.
func (w *world) allows() (all, cached int) {
	w.Helper()
	b, err := os.ReadFile(w.log)
	w.must(err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, `"verdict":"allow","reason":"rule"`) {
			all++
			if strings.Contains(line, `"cached":true`) {
				cached++
			}
		}
	}
	return all, cached
}

// TestFaultPortScan scans all ports of both families twice over from one pod, once
// slowly enough to share the queue, and the cache, of all. Flows that come back stay
// in it.
func TestFaultPortScan(t *testing.T) {
	for name, args := range map[string][]string{"one queue and cache for all": {"--noisy-rate=0", "--queues=1"}, "a queue apart": nil} {
		t.Run(name, func(t *testing.T) {
			w, d := floodWorld(t, "scan", append(args, "--decision-log-max-size=0")...)
			before := w.rss()
			clients, sent, hits := w.scanning(d, role{Name: "flood", Scan: true, Frames: d.floodFrames(), Count: 4 * 65536, For: patient})
			chaos.Report(t, chaos.Row{Fault: "port scan, " + name, Load: "connections of another pod, one each 5 ms",
				Tried: sent + len(clients.Took) + clients.Failed, Wrong: clients.Failed, Lost: w.unaccounted(),
				Note: fmt.Sprintf("hit rate of the others %.0f%%; RSS %+d KiB; p99 %s", 100*hits, (w.rss()-before)>>10, clients.at(99))})
			if sent < 2*65536 {
				t.Errorf("scanned with %d packets", sent)
			}
			if hits < 0.9 {
				t.Errorf("of the connections that had been seen before, %.0f%% came from the cache", 100*hits)
			}
			if grown := w.rss() - before; grown > 128<<20 {
				t.Errorf("the agent has grown by %d MiB", grown>>20)
			}
			w.expect("deny tcp b/free a/db:80\nallow tcp a/web a/db:80")
		})
	}
}

// TestFaultSpoofedFlood floods one pod from invented addresses. Connections to other
// pods don't suffer, and neither memory nor the kernel's table of rates grows with
// the number of addresses.
func TestFaultSpoofedFlood(t *testing.T) {
	w, d := floodWorld(t, "spoof")
	before := w.rss()
	floodEnds := w.begin("b/free", role{Name: "flood", Sources: true, Frames: d.floodFrames(), Count: 1 << 30, For: floodTime})
	clients := w.begin("a/web", role{Name: "connect", To: w.to("a/other", 80), Count: 1 << 20, Every: 2 * time.Millisecond, For: floodTime})()
	flood := floodEnds()
	lost := w.unaccounted()
	dropped, userDropped := w.queueOf(102)
	rates := strings.Count(w.command("sh", "-c", "cat /proc/thread-self/net/ipt_hashlimit/portcullis-* /proc/thread-self/net/ip6t_hashlimit/portcullis-*"), "\n")
	chaos.Report(t, chaos.Row{Fault: "flood from invented addresses", Load: "connections to another pod, one each 2 ms",
		Tried: flood.Sent + len(clients.Took) + clients.Failed, Wrong: clients.Failed, Lost: lost,
		Note: fmt.Sprintf("%d SYNs; p99 %s; queue dropped %d, socket %d; %d rates kept; RSS %+d KiB", flood.Sent, clients.at(99), dropped, userDropped, rates, (w.rss()-before)>>10)})
	if slowest := clients.at(100); slowest > 900*time.Millisecond {
		t.Errorf("a connection took %s: its first SYN was lost", slowest)
	}
	if flood.Sent < 10_000 {
		t.Errorf("a flood of %d SYNs proves nothing", flood.Sent)
	}
	if rates == 0 || rates > 20 {
		t.Errorf("the kernel keeps %d rates, for five pods", rates)
	}
	if grown := w.rss() - before; grown > 128<<20 {
		t.Errorf("the agent has grown by %d MiB", grown>>20)
	}
	w.expect(gateJudged)
}
