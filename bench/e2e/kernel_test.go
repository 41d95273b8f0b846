package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// TestCleanup removes everything, twice, and has nothing to say against a
// namespace in which there is nothing.
func TestCleanup(t *testing.T) {
	t.Parallel()
	bothModes(t, "cleanup", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.command(binary, "cleanup")
		var held []*lab.Conn
		for _, backend := range []string{"nft", "legacy"} {
			w.start("--iptables-backend", backend)
			w.expect(gateJudged)
			held = append(held, w.hold("a/web", "a/db", 80)...)
			_ = w.stop(syscall.SIGKILL)
		}
		if len(w.rules()) == 0 || len(w.marked()) < 4 {
			t.Fatalf("there is nothing to clean up: rules %q, marked connections %q", w.rules(), w.marked())
		}
		for range 2 {
			w.command(binary, "cleanup")
			if ours := w.rules(); len(ours) != 0 {
				t.Errorf("left in iptables: %q", ours)
			}
			if sets := w.command("ipset", "list", "-n"); strings.TrimSpace(sets) != "" {
				t.Errorf("left in ipset: %s", sets)
			}
			if still := w.marked(); still != nil {
				t.Errorf("connections are still marked: %q", still)
			}
		}
		w.lives(held, "everything was cleaned up")
		w.expect(gateOpen)
	})
}

// TestCleanupRefusesBesideAnAgent: an agent would put its rules back, two seconds
// later; so as long as one runs nothing is removed, and one line says why. --hold waits
// when all is clean, and ends on SIGTERM.
func TestCleanupRefusesBesideAnAgent(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "refuses", lab.Routed)
	w.start()
	before := w.rules()
	out, err := w.lab.Command(context.Background(), lab.Node, binary, "cleanup", "--hold")
	if err == nil || !strings.Contains(out, "another agent on this node? stop it first") || strings.Count(out, "\n") != 1 {
		t.Errorf("cleanup beside an agent: %v, %q", err, out)
	}
	if after := w.rules(); !slices.Equal(after, before) {
		t.Errorf("rules were %q, are %q", before, after)
	}
	w.must(w.stop(syscall.SIGTERM))
	holding, err := w.lab.Run(context.Background(), lab.Node, binary, "cleanup", "--hold")
	w.must(err)
	w.until("all is clean", func() error {
		if ours := w.rules(); len(ours) != 0 {
			return fmt.Errorf("left: %q", ours)
		}
		return nil
	})
	w.expect(gateOpen)
	select {
	case <-holding.Done():
		t.Errorf("cleanup --hold has ended: %s", holding.Output())
	default:
	}
	w.must(holding.Signal(syscall.SIGTERM))
	w.must(holding.Wait(patient))
}

// marked gives the connections, of both families, that carry any mark.
func (w *world) marked() (flows []string) {
	w.Helper()
	for _, family := range []string{"ipv4", "ipv6"} {
		for flow := range strings.Lines(w.command("conntrack", "-L", "-f", family)) {
			if strings.Contains(flow, "mark=") && !strings.Contains(flow, "mark=0 ") {
				flows = append(flows, flow)
			}
		}
	}
	return flows
}

// TestOthersRules has rules of others around: what policy accepts may still be
// dropped by the filter table, what leaves by another address is judged by its
// own, and what isn't tracked is judged all the same.
func TestOthersRules(t *testing.T) {
	t.Parallel()
	bothModes(t, "others", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.host("docker", "172.17.0.5", "fd00:17::5")
		w.apply("more.yaml", policy("b/out", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 172.17.0.0/16}}, `+
			`{ipBlock: {cidr: "fd00:17::/64"}}], ports: [{port: 80}]}]}`))
		w.start()
		w.expect(gateJudged + "deny udp b/free a/db:80")
		for _, tables := range []string{"iptables", "ip6tables"} {
			w.command(tables, "-w", "-A", "FORWARD", "-p", "udp", "--dport", "80", "-j", "DROP")
			w.command(tables, "-w", "-t", "nat", "-A", "POSTROUTING", "-p", "tcp", "-j", "MASQUERADE")
			w.command(tables, "-w", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "6379", "-j", "CT", "--notrack")
		}
		w.expect(`
			deny  udp a/web  a/db:80      # by the filter table
			allow tcp a/web  a/db:80
			deny  tcp b/free a/db:80
			deny  tcp a/web  a/db:6379
			allow tcp b/free docker:80
			deny  tcp b/free docker:6379
			deny  tcp a/db   docker:80
		`)
	})
}

// TestRulesBehindOurs holds that a connection's first packet, which is the only
// one queued, comes to the rules that stand behind ours in FORWARD: where TCP's
// segment size is clamped, on SYNs alone.
func TestRulesBehindOurs(t *testing.T) {
	t.Parallel()
	bothModes(t, "behind", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start()
		for _, tables := range []string{"iptables", "ip6tables"} {
			w.command(tables, "-w", "-t", "mangle", "-A", "FORWARD", "-p", "tcp", "--syn", "--dport", "80", "-j", "TCPMSS", "--set-mss", "1111")
		}
		w.expect("allow tcp a/web a/db:80")
		for _, tables := range []string{"iptables", "ip6tables"} {
			var clamped string
			for line := range strings.Lines(w.command(tables, "-w", "-t", "mangle", "-vnxL", "FORWARD")) {
				if strings.Contains(line, "TCPMSS") {
					clamped = strings.Fields(line)[0]
				}
			}
			if clamped == "" || clamped == "0" {
				t.Errorf("%s: %q SYNs were clamped behind our rules", tables, clamped)
			}
		}
	})
}

// TestBridgeWithoutNetfilter starts an agent where bridged packets don't come
// past iptables: it switches that on.
func TestBridgeWithoutNetfilter(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "bridge-nf", lab.Bridged)
	for _, key := range []string{"net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0"} {
		w.must(w.sysctl(key))
	}
	w.start()
	w.expect(gateJudged)
}

func (w *world) sysctl(setting string) error {
	_, err := w.lab.Command(w.Context(), lab.Node, "sysctl", "-q", "-w", setting)
	return err
}

// TestRevokedConnection sets the revoked bit on a live connection: it carries
// nothing more, while the others go on.
func TestRevokedConnection(t *testing.T) {
	t.Parallel()
	bothModes(t, "revoked", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start("--mark-bits=0x3000")
		revoked, kept := w.hold("a/web", "a/db", 80), w.hold("a/web", "a/db", 80)
		for _, c := range revoked {
			port := netip.MustParseAddrPort(c.LocalAddr().String())
			family := "ipv4"
			if port.Addr().Is6() {
				family = "ipv6"
			}
			w.command("conntrack", "-U", "-f", family, "-p", "tcp", "--sport", port.String()[strings.LastIndex(port.String(), ":")+1:], "--mark", "0x2000/0x2000")
			if err := c.Exchange("more", lab.Timeout); err == nil {
				t.Errorf("a revoked connection from %s still carries data", port)
			}
		}
		w.lives(kept, "another was revoked")
	})
}

// TestForgottenConnections empties the connection table: what goes on in the
// middle is judged like what begins.
func TestForgottenConnections(t *testing.T) {
	t.Parallel()
	bothModes(t, "forgotten", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.remove("db.yaml")
		w.start()
		good, bad := w.hold("a/web", "a/db", 80), w.hold("b/free", "a/db", 80)
		w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], `+
			`ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}]}]}`))
		w.settle("deny tcp b/free a/db:80\nallow tcp a/web a/db:80")
		w.command("conntrack", "-F")
		w.lives(good, "its entry was gone")
		for _, c := range bad {
			if err := c.Exchange("more", lab.Timeout); err == nil {
				t.Errorf("a connection of %s that policy denies goes on unjudged", c.LocalAddr())
			}
		}
	})
}

// TestForwardedByTheNodeItself sends what IPVS would: packets that leave by the
// node's OUTPUT chain, with a pod's address for a source. They are judged too.
func TestForwardedByTheNodeItself(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "ipvs", lab.Routed)
	w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`))
	w.start()
	n, err := w.lab.CountUDP("a/db", 5000)
	w.must(err)
	for i, to := range w.lab.IPs("a/db") {
		w.sendAs(w.lab.IPs("b/free")[i], netip.AddrPortFrom(to, 5000))
		w.sendAs(w.lab.IPs("a/web")[i], netip.AddrPortFrom(to, 5000))
	}
	w.logged(2, func(d line) bool { return d.Verdict == "deny" && d.Src.Pod == "free" && d.Dst.Port == 5000 })
	w.logged(2, func(d line) bool { return d.Verdict == "allow" && d.Src.Pod == "web" && d.Dst.Port == 5000 })
	w.until("the allowed ones arrive", func() error {
		if n.Count() < 2 {
			return errNotYet
		}
		return nil
	})
	if n.Count() != 2 {
		t.Errorf("%d datagrams arrived, 2 were allowed", n.Count())
	}
}

// sendAs sends a datagram from the node, in a pod's name.
func (w *world) sendAs(src netip.Addr, to netip.AddrPort) {
	w.Helper()
	c, err := w.dialAs(src, to)
	w.must(err)
	defer c.Close()
	_, err = c.Write([]byte("x"))
	w.must(err)
}

// dialAs gives a UDP socket of the node's that speaks in a pod's name.
func (w *world) dialAs(src netip.Addr, to netip.AddrPort) (c net.Conn, err error) {
	err = w.lab.Do(lab.Node, func() error {
		d := net.Dialer{
			LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0)),
			Control: func(_, _ string, raw syscall.RawConn) (err error) {
				level, option := unix.SOL_IP, unix.IP_TRANSPARENT
				if src.Is6() {
					level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
				}
				if control := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) }); control != nil {
					return control
				}
				return err
			},
		}
		c, err = d.DialContext(context.Background(), "udp", to.String())
		return err
	})
	return c, err
}

// TestManyAtOnce opens a few hundred connections together: each is judged, and
// none is lost.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "many", lab.Routed)
	w.start()
	each := w.rows("allow tcp a/web a/db:80\nallow udp a/web a/db:80")
	var rows []row
	for range 75 {
		rows = append(rows, each...)
	}
	w.must(w.wrong(rows))
	allowed := func(protocol string) func(line) bool {
		return func(d line) bool { return d.Verdict == "allow" && d.Dst.Pod == "db" && d.Protocol == protocol }
	}
	w.logged(len(rows)/2, allowed("TCP"))
	// Of the UDP sockets some may have drawn the port of one that was closed before:
	// that is the same connection to conntrack, and is judged once.
	w.until("the UDP connections are logged", func() error {
		ports, decisions := map[string]bool{}, 0
		for _, d := range w.decisions() {
			if allowed("UDP")(d) {
				ports[fmt.Sprint(d.Src)] = true
				decisions++
			}
		}
		if decisions != len(ports) || decisions < len(rows)/2-10 {
			return fmt.Errorf("%d decisions about %d UDP connections of %d attempts", decisions, len(ports), len(rows)/2)
		}
		return nil
	})
}

// TestAcceptedRuleGone takes away the rule that lets accepted packets by. Until
// it is mended they come to the queue again, once, and not without end.
func TestAcceptedRuleGone(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "repeat", lab.Routed)
	w.start()
	for _, tables := range []string{"iptables", "ip6tables"} {
		w.command(tables, "-w", "-t", "mangle", "-D", "PORTCULLIS-FWD-1", "-m", "mark", "--mark", "0x1000/0x1000", "-j", "RETURN")
	}
	w.expect("allow tcp a/web a/db:80")
	w.expect(gateJudged)
	judged := map[string]int{}
	for _, d := range w.decisions() {
		judged[fmt.Sprint(d.Protocol, d.Src, d.Dst)]++
	}
	for connection, n := range judged {
		if n > 2 && strings.HasPrefix(connection, "TCP") {
			t.Errorf("a connection was judged %d times: %s", n, connection)
		}
	}
}
