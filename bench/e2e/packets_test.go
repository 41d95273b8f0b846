package e2e

import (
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"portcullis/bench/lab"
)

// TestOneDecisionPerConnection shows what conntrack carries: a connection's
// other packets and its replies aren't judged, nor are the other datagrams of a
// stream that nobody answers; a second connection is judged, from the cache.
func TestOneDecisionPerConnection(t *testing.T) {
	t.Parallel()
	bothModes(t, "once", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start("--queues", "1") // another CPU's worker has a cache of its own
		for _, c := range w.hold("a/web", "a/db", 80) {
			for range 5 {
				w.must(c.Exchange("again", patient))
			}
		}
		toDB := func(d line) bool { return d.Protocol == "TCP" && d.Dst.Pod == "db" && d.Dst.Port == 80 }
		for _, d := range w.logged(2, toDB) {
			if d.Cached {
				t.Errorf("the first connection of its kind came from the cache: %+v", d)
			}
		}
		w.hold("a/web", "a/db", 80)
		second := w.logged(4, toDB)[2:]
		for _, d := range second {
			if !d.Cached {
				t.Errorf("the second connection of its kind didn't come from the cache: %+v", d)
			}
		}
	})
}

// TestOneWayStream sends five datagrams of which none is answered: all stay NEW
// to conntrack, one is judged, all arrive.
func TestOneWayStream(t *testing.T) {
	t.Parallel()
	bothModes(t, "oneway", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/web", 11, "app=web")
		w.pod(mode, "a/db", 12, "app=db", lab.Port{Proto: lab.TCP, Port: 80})
		w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`))
		w.start()
		n, err := w.lab.CountUDP("a/db", 80)
		w.must(err)
		for i, ip := range w.lab.IPs("a/db") {
			c, err := w.lab.Open("a/web", lab.UDP, netip.AddrPortFrom(ip, 80), patient)
			w.must(err)
			t.Cleanup(func() { c.Close() })
			for j := range 5 {
				_, err := c.Write([]byte("no answer, please"))
				w.must(err)
				// One after the other: until the first has arrived, its
				// connection isn't there to carry the second.
				w.until("the datagram arrives", func() error {
					if n.Count() < 5*i+j+1 {
						return errNotYet
					}
					return nil
				})
			}
		}
		w.logged(2, func(d line) bool { return d.Protocol == "UDP" && d.Dst.Pod == "db" })
	})
}

// TestDeniedStream shows that a refused stream doesn't wear its way in.
func TestDeniedStream(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "worn", lab.Routed)
	w.start()
	n, err := w.lab.CountUDP("a/db", 5000)
	w.must(err)
	c, err := w.lab.Open("a/web", lab.UDP, netip.AddrPortFrom(w.lab.IP4("a/db"), 5000), patient)
	w.must(err)
	defer c.Close()
	for range 5 {
		_, err := c.Write([]byte("let me in"))
		w.must(err)
	}
	w.logged(5, func(d line) bool { return d.Protocol == "UDP" && d.Dst.Port == 5000 && d.Verdict == "deny" })
	if n.Count() != 0 {
		t.Errorf("%d datagrams got through", n.Count())
	}
}

// TestLongDatagrams sends datagrams that go as fragments: an allowed one comes
// through whole, a denied one not at all.
func TestLongDatagrams(t *testing.T) {
	t.Parallel()
	bothModes(t, "long", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start()
		word := strings.Repeat("four thousand bytes ", 200)
		for _, ip := range w.lab.IPs("a/db") {
			for from, want := range map[string]lab.Outcome{"a/web": lab.Connected, "b/free": lab.TimedOut} {
				c, err := w.lab.Open(from, lab.UDP, netip.AddrPortFrom(ip, 80), patient)
				w.must(err)
				t.Cleanup(func() { c.Close() })
				wait := lab.Timeout
				if want == lab.Connected {
					wait = patient
				}
				if err := c.Exchange(word, wait); (err == nil) != (want == lab.Connected) {
					t.Errorf("%s to %s: want %s, got %v", from, ip, want, err)
				}
			}
		}
	})
}

// TestServices puts DNAT in front of a pod, as kube-proxy does: policy sees the
// backend's address and port, and a pod reaches itself through its Service.
func TestServices(t *testing.T) {
	t.Parallel()
	bothModes(t, "services", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		backend := lab.Port{Proto: lab.TCP, Port: 8080}
		w.pod(mode, "a/web", 11, "app=web", backend)
		w.pod(mode, "a/db", 12, "app=db", backend)
		w.pod(mode, "a/vip", 13, "app=vip", backend)
		w.pod(mode, "a/other", 14, "", backend)
		for tables, ips := range map[string][2]string{
			"iptables":  {"10.96.0.10", w.lab.IP4("a/db").String()},
			"ip6tables": {"fd00:96::10", w.lab.IP6("a/db").String()},
		} {
			to := netip.AddrPortFrom(netip.MustParseAddr(ips[1]), 8080).String()
			w.command(tables, "-w", "-t", "nat", "-A", "PREROUTING", "-d", ips[0], "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", to)
			// Without this the pod would get packets from itself by wire.
			w.command(tables, "-w", "-t", "nat", "-A", "POSTROUTING", "-s", ips[1], "-d", ips[1], "-j", "MASQUERADE")
		}
		w.start()
		const rows = `
			allow tcp a/web   10.96.0.10:80
			allow tcp a/web   [fd00:96::10]:80
			deny  tcp a/other 10.96.0.10:80
			deny  tcp a/other [fd00:96::10]:80
			deny  tcp a/vip   10.96.0.10:80     # its egress knows the ClusterIP only
			deny  tcp a/vip   [fd00:96::10]:80
			allow tcp a/db    10.96.0.10:80     # itself
			allow tcp a/db    [fd00:96::10]:80
			allow tcp a/web   a/db:8080
			deny  tcp a/other a/db:8080
		`
		w.open(rows)
		w.apply("service.yaml", strings.Join([]string{
			policy("a/deny", denyAll),
			policy("a/db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchExpressions: `+
				`[{key: app, operator: In, values: [web, vip]}]}}], ports: [{port: 8080}]}]}`),
			policy("a/web", `{podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 8080}]}]}`),
			policy("a/vip", `{podSelector: {matchLabels: {app: vip}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 10.96.0.0/16}}, {ipBlock: {cidr: "fd00:96::/32"}}]}]}`),
		}, "---\n"))
		w.settle(rows)
		w.expect(rows)
	})
}

// TestDecisionLog reads what the log says about an allow and about denies.
func TestDecisionLog(t *testing.T) {
	t.Parallel()
	bothModes(t, "log", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start()
		w.expect("allow tcp4 a/web a/db:80\ndeny tcp6 b/free a/db:80\ndeny tcp4 a/db b/free:80\ndeny icmp4 a/web a/db")

		d := w.logged(1, func(d line) bool { return d.Verdict == "allow" })[0]
		if d.Node != lab.NodeName || d.Reason != "rule" || d.Protocol != "TCP" || d.Time.IsZero() || d.LatencyNs <= 0 {
			t.Errorf("allow: %+v", d)
		}
		if d.Src.Namespace != "a" || d.Src.Pod != "web" || d.Src.IP != w.lab.IP4("a/web").String() || d.Src.Port == 0 ||
			d.Dst.Namespace != "a" || d.Dst.Pod != "db" || d.Dst.IP != w.lab.IP4("a/db").String() || d.Dst.Port != 80 {
			t.Errorf("allow's ends: %+v", d)
		}
		if d.Ingress == nil || d.Ingress.AllowedBy == nil || d.Ingress.AllowedBy.Policy != "a/db" || d.Ingress.AllowedBy.Rule != 0 {
			t.Errorf("allow's rule: %+v", d.Ingress)
		}

		d = w.logged(1, func(d line) bool { return d.Protocol == "TCP" && d.Verdict == "deny" && d.Dst.Pod == "db" })[0]
		if d.Reason != "no-rule" || d.Src.Pod != "free" || d.Dst.IP != w.lab.IP6("a/db").String() {
			t.Errorf("deny: %+v", d)
		}
		if s := d.Ingress; s == nil || !s.Isolated || s.Verdict != "deny" || s.AllowedBy != nil || strings.Join(s.Policies, " ") != "a/db" {
			t.Errorf("deny's policies: %+v", s)
		}
		d = w.logged(1, func(d line) bool { return d.Dst.Pod == "free" })[0]
		if s := d.Egress; s == nil || s.Verdict != "deny" || strings.Join(s.Policies, " ") != "a/db" {
			t.Errorf("denied egress: %+v", s)
		}
		w.logged(1, func(d line) bool { return d.Protocol == "ICMP" && d.Verdict == "deny" && d.Dst.Pod == "db" })
		for _, d := range w.decisions() {
			if d.Src.Pod != "db" && d.Dst.Pod != "db" {
				t.Errorf("a connection of nobody isolated was judged: %+v", d)
			}
		}
	})
}

// TestRotatedLog renames the decision log and has the agent open it anew.
func TestRotatedLog(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "rotated", lab.Routed)
	w.start()
	w.expect("allow tcp4 a/web a/db:80")
	w.logged(1, func(line) bool { return true })
	w.must(os.Rename(w.log, w.log+".1"))
	w.must(w.agent.Signal(syscall.SIGHUP))
	w.until("there is a new file", func() error {
		_, err := os.Stat(w.log)
		return err
	})
	w.expect("deny tcp4 b/free a/db:80")
	w.logged(1, func(d line) bool { return d.Verdict == "deny" })
	if n := len(w.decisions()); n != 1 {
		t.Errorf("%d decisions are in the new file", n)
	}
}

// TestHTTP looks at the three pages and the log's file mode.
func TestHTTP(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "http", lab.Routed)
	w.start()
	w.expect(gateJudged)
	for _, page := range []string{"/healthz", "/readyz", "/readyz?verbose", "/metrics"} {
		text, err := w.get(page)
		w.must(err)
		if page == "/metrics" && !strings.Contains(text, "\nportcullis_") {
			t.Errorf("no metrics of ours:\n%s", text)
		}
	}
	info, err := os.Stat(w.log)
	w.must(err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the decision log's mode is %o", info.Mode().Perm())
	}
}
