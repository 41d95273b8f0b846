package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"portcullis/bench/lab"
)

const fromWeb = `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`

// openWorld is gateWorld without a policy.
func openWorld(t *testing.T, name string, mode lab.Mode) *world {
	w := gateWorld(t, name, mode)
	w.remove("db.yaml")
	return w
}

// TestStartCutsWhatPolicyDenies opens connections while there is no gate: when the
// agent is ready, those that policy denies are cut, whether conntrack knew them before
// or meets them in their middle, and the others go on.
func TestStartCutsWhatPolicyDenies(t *testing.T) {
	t.Parallel()
	for name, track := range map[string]bool{"known": true, "unknown": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bothModes(t, "first-"+name, func(t *testing.T, name string, mode lab.Mode) {
				w := openWorld(t, name, mode)
				if track {
					w.command("iptables", "-w", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
					w.command("ip6tables", "-w", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
				}
				s := w.servePulses("a/db")
				allowed, denied := s.pulses("a/web", "a/db"), s.pulses("b/free", "a/db")
				if !track {
					// A datagram begins a flow in its own direction, and that may
					// be an answer that was under way.
					denied = slices.DeleteFunc(denied, func(p *pulse) bool { return strings.HasPrefix(p.name, "echoed UDP") })
				}
				w.apply("db.yaml", policy("a/db", fromWeb))
				start := time.Now()
				w.start()
				w.stopped(denied, time.Now().Add(-900*time.Millisecond), "the agent was ready")
				w.beating(allowed, time.Now(), "the agent's start")
				if track {
					w.tellsOfRevoked("the agent started", "b/free", "a/db", len(denied), start)
				}
				w.must(w.stop(syscall.SIGTERM))
				w.remove("db.yaml")
				again := time.Now()
				w.start()
				w.beating(denied, again, "a start with another policy")
			})
		})
	}
}

// TestFlushedTable empties conntrack's table under open connections: those that are
// allowed go on, and those that were revoked don't come back, not by the answers of a
// server that may speak to anybody either.
func TestFlushedTable(t *testing.T) {
	t.Parallel()
	bothModes(t, "flushed", func(t *testing.T, name string, mode lab.Mode) {
		w := openWorld(t, name, mode)
		w.start()
		s := w.servePulses("a/db")
		allowed, denied := s.pulses("a/web", "a/db"), s.pulses("b/free", "a/db")
		change := time.Now()
		w.apply("db.yaml", policy("a/db", fromWeb))
		w.stopped(denied, change, "policy changed")
		w.command("conntrack", "-F")
		flushed := time.Now()
		w.beating(allowed, flushed, "the table was flushed")
		// By now the server tries again every second or three to send on.
		stalls.after(flushed, 4*time.Second)
		w.stopped(denied, flushed.Add(-time.Second), "the table was flushed")
	})
}

// TestFlushedTableOfServerIsolatedBothWays is the same for a server that may open no
// connection: what its clients send tells by its ports who has opened the connection.
func TestFlushedTableOfServerIsolatedBothWays(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "flushed2", lab.Routed)
	w.start()
	held := w.hold("a/web", "a/db", 80)
	w.command("conntrack", "-F")
	w.lives(held, "the table was flushed")
}

// TestBegunByAnAck begins with what looks like the middle of a connection, to have
// conntrack take it for established: who may not connect gets no further, neither to
// a server nor from a port that only servers have.
func TestBegunByAnAck(t *testing.T) {
	t.Parallel()
	bothModes(t, "ack", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.must(w.lab.Serve("b/free", lab.Port{Proto: lab.TCP, Port: 40000}))
		w.must(w.lab.Serve("a/web", lab.Port{Proto: lab.TCP, Port: 40000}))
		w.start()
		for _, c := range []struct {
			from     string
			fromPort uint16
			to       string
			toPort   uint16
		}{
			{"b/free", 45678, "a/db", 80}, {"b/free", 79, "a/db", 80}, {"a/web", 45678, "a/db", 6379},
			{"a/db", 85, "a/web", 40000}, // the other way round web may call db
			{"a/db", 85, "b/free", 40000},
		} {
			from, to := netip.AddrPortFrom(w.lab.IP4(c.from), c.fromPort), netip.AddrPortFrom(w.lab.IP4(c.to), c.toPort)
			w.sendACK(c.from, from, to)
			err := w.lab.Do(c.from, func() error {
				d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv4Unspecified(), c.fromPort)), Timeout: lab.Timeout}
				d.SetMultipathTCP(false)
				conn, err := d.Dial("tcp4", to.String())
				if err == nil {
					conn.Close()
				}
				return err
			})
			if nerr, ok := err.(net.Error); !ok || !nerr.Timeout() {
				t.Errorf("%s to %s after an ACK: %v", c.from, to, err)
			}
		}
		if n := w.flows(func(entry string) bool {
			return strings.Contains(entry, "tcp") && strings.Contains(entry, w.lab.IP4("a/db").String())
		}); n != 0 {
			t.Errorf("conntrack knows of %d connections", n)
		}
	})
}

// sendACK sends a lone ACK, as from the middle of a connection.
func (w *world) sendACK(who string, from, to netip.AddrPort) {
	w.Helper()
	ip := &layers.IPv4{SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice(), Protocol: layers.IPProtocolTCP}
	tcp := &layers.TCP{SrcPort: layers.TCPPort(from.Port()), DstPort: layers.TCPPort(to.Port()), Seq: 1000, Ack: 2000, ACK: true, Window: 1000}
	w.must(tcp.SetNetworkLayerForChecksum(ip))
	b := gopacket.NewSerializeBuffer()
	w.must(gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, tcp))
	w.must(w.lab.Do(who, func() error {
		c, err := net.Dial("ip4:6", to.Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(b.Bytes())
		return err
	}))
	time.Sleep(20 * time.Millisecond)
}

// TestRelatedConnectionsFallToo has conntrack's FTP helper expect a data connection,
// which the gate lets pass as related to the one that announced it: it is cut with it.
func TestRelatedConnectionsFallToo(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "ftp", lab.Routed)
	policyOf := func(peer string) string {
		return policy("a/db", fmt.Sprintf(`{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: %s}}}], ports: [{port: 21}]}]}`, peer))
	}
	w.apply("db.yaml", policyOf("web"))
	w.command("iptables", "-w", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "21", "-j", "CT", "--helper", "ftp")
	w.start()
	db, web := w.lab.IP4("a/db"), w.lab.IP4("a/web")
	var control, data net.Listener
	listen := func(who string, at netip.AddrPort) (ln net.Listener) {
		w.must(w.lab.Do(who, func() (err error) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			ln, err = lc.Listen(context.Background(), "tcp4", at.String())
			return err
		}))
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	control, data = listen("a/db", netip.AddrPortFrom(db, 21)), listen("a/web", netip.AddrPortFrom(web, 20000))
	c, err := w.lab.Open("a/web", lab.TCP, netip.AddrPortFrom(db, 21), patient)
	w.must(err)
	defer c.Close()
	server, err := control.Accept()
	w.must(err)
	defer server.Close()
	commands := bufio.NewReader(server)
	for _, command := range []string{"USER me", fmt.Sprintf("PORT %s,78,32", strings.ReplaceAll(web.String(), ".", ","))} { // 78*256+32 = 20000
		_, err = fmt.Fprintf(c, "%s\r\n", command)
		w.must(err)
		_, err = commands.ReadString('\n') // the helper reads line by line too
		w.must(err)
	}
	// The server may open no connection but this one.
	w.expect("deny tcp4 a/db a/web:6379")
	toClient, err := w.lab.Open("a/db", lab.TCP, netip.AddrPortFrom(web, 20000), patient)
	w.must(err)
	defer toClient.Close()
	atClient, err := data.Accept()
	w.must(err)
	defer atClient.Close()
	p := &pulse{name: "FTP data"}
	start := time.Now()
	go feed(toClient)
	go p.hear(atClient)
	w.beating([]*pulse{p}, start, "it was opened")
	w.stillness()
	w.apply("other.yaml", policy("a/other", `{podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{}]}`))
	time.Sleep(time.Second)
	w.beating([]*pulse{p}, time.Now(), "a change that allows its control connection")
	change := time.Now()
	w.apply("db.yaml", policyOf("nobody"))
	w.stopped([]*pulse{p}, change, "its control connection was revoked")
}

// TestRevokedBehindServices revokes connections that were sent on to a pod, by DNAT
// and by the node's own OUTPUT: the pod that answers counts, not the address that was
// called.
func TestRevokedBehindServices(t *testing.T) {
	t.Parallel()
	bothModes(t, "behind-svc", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/web", 11, "app=web", lab.Port{Proto: lab.TCP, Port: 8080})
		w.pod(mode, "a/db", 12, "app=db", lab.Port{Proto: lab.TCP, Port: 8080})
		w.host("outside", "203.0.113.9")
		for _, rule := range [][]string{
			{"PREROUTING", "-d", "10.96.0.10", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", w.lab.IP4("a/db").String() + ":8080"},
			{"PREROUTING", "-d", lab.NodeIPs[0].String(), "-p", "tcp", "--dport", "30080", "-j", "DNAT", "--to-destination", w.lab.IP4("a/db").String() + ":8080"},
			{"POSTROUTING", "-d", w.lab.IP4("a/db").String(), "-p", "tcp", "--dport", "8080", "-j", "MASQUERADE"}, // hairpin, and NodePort
		} {
			w.command(append([]string{"iptables", "-w", "-t", "nat", "-A"}, rule...)...)
		}
		admits := `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: %s}}}, {ipBlock: {cidr: %s}}]}]}`
		w.apply("db.yaml", policy("a/db", fmt.Sprintf(admits, "web", "203.0.113.0/24")))
		w.start()
		n, err := w.lab.CountUDP("a/db", 5000)
		w.must(err)
		open := map[string]*lab.Conn{}
		for who, to := range map[string]string{"a/web": "10.96.0.10:80", "a/db": "10.96.0.10:80", "outside": lab.NodeIPs[0].String() + ":30080"} {
			c, err := w.lab.Open(who, lab.TCP, netip.MustParseAddrPort(to), patient)
			w.must(err)
			defer c.Close()
			w.must(c.Exchange("hello", patient))
			open[who] = c
		}
		forwarded, err := w.dialAs(w.lab.IP4("a/web"), netip.AddrPortFrom(w.lab.IP4("a/db"), 5000))
		w.must(err)
		go feed(forwarded)
		defer forwarded.Close()
		w.until("datagrams that the node forwards arrive", func() error {
			if n.Count() < 3 {
				return errNotYet
			}
			return nil
		})
		change := time.Now()
		w.apply("db.yaml", policy("a/db", fmt.Sprintf(admits, "none", "198.51.100.0/24")))
		stalls.after(change, time.Second)
		before := n.Count()
		for who, c := range open {
			if living := c.Exchange("still?", lab.Timeout) == nil; living != (who == "a/db") {
				t.Errorf("a connection from %s through a Service lives: %v", who, living)
			}
		}
		if after := n.Count(); after != before {
			t.Errorf("%d datagrams that the node forwards arrived a second after the change", after-before)
		}
		var told []string
		w.until("the log tells of them", func() error {
			told = nil
			for _, d := range w.decisions() {
				if d.Verdict == "revoked" {
					told = append(told, fmt.Sprintf("%s %s %s:%d", d.Protocol, d.Src.IP, d.Dst.Pod, d.Dst.Port))
				}
			}
			if len(told) < 3 {
				return errNotYet
			}
			return nil
		})
		slices.Sort(told)
		web := w.lab.IP4("a/web").String()
		if want := []string{"TCP " + web + " db:8080", "TCP 203.0.113.9 db:8080", "UDP " + web + " db:5000"}; !slices.Equal(told, want) {
			t.Errorf("the log tells of %q, want %q", told, want)
		}
	})
}

// TestRepairJudgesWhatPassed takes the gate away: what gets through until it is
// mended is judged when it is.
func TestRepairJudgesWhatPassed(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "passed", lab.Routed)
	w.start()
	w.stillness()
	var c *lab.Conn
	w.until("somebody gets through before the gate is mended", func() (err error) {
		w.command("iptables", "-w", "-t", "mangle", "-F", "FORWARD")
		if c, err = w.lab.Open("b/free", lab.TCP, netip.AddrPortFrom(w.lab.IP4("a/db"), 80), lab.Timeout); err != nil {
			return errNotYet
		}
		return nil
	})
	defer c.Close()
	w.until("what passed is cut", func() error {
		if c.Exchange("still?", 100*time.Millisecond) == nil {
			return errNotYet
		}
		return nil
	})
	w.tellsOfRevoked("the gate was mended", "b/free", "a/db", 1, time.Time{})
	if n := w.metric("portcullis_repairs_total"); n == 0 {
		t.Error("nothing was repaired")
	}
}
