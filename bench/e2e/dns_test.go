package e2e

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

const dnsPolicy = `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{ports: [{port: 53, protocol: UDP}]}], egress: [{ports: [{port: 53, protocol: UDP}]}]}`

// TestFaultTwoQuestionsAtOnce sends A and AAAA questions as resolvers do: two datagrams
// at once over one socket. Both are the first packet of a flow that conntrack doesn't
// know yet, both are queued, and when the second comes back the first has already
// entered the flow. No answer may be lost to that: neither to a server, nor to a
// Service with two of them, where each question was given a server of its own.
func TestFaultTwoQuestionsAtOnce(t *testing.T) {
	bothModes(t, "dns", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		dns := lab.Port{Proto: lab.UDP, Port: 53}
		w.pod(mode, "a/client", 11, "app=client")
		w.pod(mode, "a/dns1", 12, "app=dns", dns)
		w.pod(mode, "a/dns2", 13, "app=dns", dns)
		service := w.service("a/dns1", "a/dns2")
		w.apply("dns.yaml", policy("a/dns", dnsPolicy))
		w.start()
		for _, c := range []struct {
			what string
			to   []netip.AddrPort
		}{{"a server", w.to("a/dns1", 53)}, {"a Service of two servers", service}} {
			f := found{}
			for _, stopped := range []int{0, 0, 1, 1, 1, 1, 1, 1, 1, 1} {
				got := w.asks(c.to, 100, stopped == 1)
				f.Sent, f.Failed = f.Sent+got.Sent, f.Failed+got.Failed
			}
			stats := w.command("conntrack", "-S")
			chaos.Report(t, chaos.Row{Fault: fmt.Sprintf("A and AAAA at once to %s, %s", c.what, mode), Load: "-", Tried: f.Sent, Wrong: f.Failed,
				Lost: w.unaccounted(), Note: fmt.Sprintf("conntrack resolved %d clashes, and failed to insert %d", statistic(stats, "clash_resolve"), statistic(stats, "insert_failed"))})
		}
	})
}

// asks has a client ask over so many sockets. If the agent is stopped until all
// questions are queued, both of each socket's are for certain, and neither is in
// conntrack when the other is judged.
func (w *world) asks(to []netip.AddrPort, sockets int, stopped bool) found {
	w.Helper()
	if !stopped {
		return w.begin("a/client", role{Name: "ask", To: to, Count: sockets, For: patient / 2})()
	}
	w.command("conntrack", "-F") // a port that was used before would be known
	w.must(w.agent.Signal(syscall.SIGSTOP))
	answered := w.begin("a/client", role{Name: "ask", To: to, Count: sockets, For: patient / 2})
	w.until("all questions are queued", func() error {
		var waiting int
		for l := range strings.Lines(w.command("cat", "/proc/thread-self/net/netfilter/nfnetlink_queue")) {
			var queue, owner, n int
			if _, err := fmt.Sscan(l, &queue, &owner, &n); err != nil {
				return err
			}
			waiting += n
		}
		if waiting < 2*sockets {
			return fmt.Errorf("%d so far", waiting)
		}
		return nil
	})
	w.must(w.agent.Signal(syscall.SIGCONT))
	return answered()
}

// statistic sums one of conntrack's counters over the CPUs.
func statistic(text, name string) (sum int) {
	for _, word := range strings.Fields(text) {
		if value, ok := strings.CutPrefix(word, name+"="); ok {
			n, _ := strconv.Atoi(value)
			sum += n
		}
	}
	return sum
}

// service gives two pods a common address, as kube-proxy does: half of the flows
// each, chosen by chance.
func (w *world) service(one, two string) (addresses []netip.AddrPort) {
	w.Helper()
	for i, ip := range []string{"10.96.0.53", "fd00:96::53"} {
		for n, who := range []string{one, two} {
			chance := []string{"-m statistic --mode random --probability 0.5", ""}[n]
			to := netip.AddrPortFrom(w.lab.IPs(who)[i], 53)
			w.command(strings.Fields(fmt.Sprintf("%s -t nat -A PREROUTING -d %s -p udp --dport 53 %s -j DNAT --to-destination %s",
				[]string{"iptables", "ip6tables"}[i], ip, chance, to))...)
		}
		addresses = append(addresses, netip.AddrPortFrom(netip.MustParseAddr(ip), 53))
	}
	return addresses
}
