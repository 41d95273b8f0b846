package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"portcullis/bench/lab"
)

var errNotYet = errors.New("not yet")

// gateWorld has a pod that only a/web may reach, and a free one.
func gateWorld(t *testing.T, name string, mode lab.Mode) *world {
	w := newWorld(t, name)
	w.pod(mode, "a/web", 11, "app=web")
	w.pod(mode, "a/db", 12, "app=db")
	w.pod(mode, "b/free", 13, "")
	w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], `+
		`ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}, {port: 80, protocol: UDP}]}]}`))
	return w
}

const (
	// gateJudged is what the policy says; gateShut is what holds for as long
	// as nobody judges behind a closed gate; gateOpen is no gate at all.
	gateJudged = `
		allow tcp  a/web  a/db:80
		allow udp  a/web  a/db:80
		deny  tcp  a/web  a/db:6379
		deny  icmp a/web  a/db
		deny  tcp  b/free a/db:80
		deny  tcp  a/db   b/free:80
		allow tcp  a/web  b/free:80
	`
	gateShut = `
		deny  tcp  a/web  a/db:80
		deny  udp  a/web  a/db:80
		deny  icmp a/web  a/db
		deny  tcp  b/free a/db:80
		deny  tcp  a/db   b/free:80
		allow tcp  a/web  b/free:80
		allow tcp  b/free a/web:80
		allow tcp  node   a/db:80
	`
	gateOpen = `
		allow tcp  a/web  a/db:80
		allow tcp  a/web  a/db:6379
		allow icmp a/web  a/db
		allow tcp  b/free a/db:80
		allow tcp  a/db   b/free:80
	`
)

// hold opens a TCP connection in each family that lasts as long as the test.
func (w *world) hold(from, to string, port uint16) (held []*lab.Conn) {
	w.Helper()
	for _, ip := range w.lab.IPs(to) {
		c, err := w.lab.Open(from, lab.TCP, netip.AddrPortFrom(ip, port), patient)
		w.must(err)
		w.Cleanup(func() { c.Close() })
		w.must(c.Exchange("first", patient))
		held = append(held, c)
	}
	return held
}

// lives shows that established connections still carry data both ways.
func (w *world) lives(held []*lab.Conn, when string) {
	w.Helper()
	for _, c := range held {
		if err := c.Exchange(when, patient); err != nil {
			w.Errorf("an established connection died when %s: %v", when, err)
		}
	}
}

// TestGateWithoutAgent stops and kills agents: closed, the rules stay, new
// connections of isolated pods wait in vain and established ones go on; open,
// nothing is in anybody's way.
func TestGateWithoutAgent(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		sig      syscall.Signal
		failOpen bool
	}{
		{"term-closed", syscall.SIGTERM, false},
		{"kill-closed", syscall.SIGKILL, false},
		{"term-open", syscall.SIGTERM, true},
		{"kill-open", syscall.SIGKILL, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			bothModes(t, c.name, func(t *testing.T, name string, mode lab.Mode) {
				w := gateWorld(t, name, mode)
				flag := fmt.Sprintf("--fail-open=%v", c.failOpen)
				w.start(flag)
				w.expect(gateJudged)
				held := w.hold("a/web", "a/db", 80)
				err := w.stop(c.sig)
				if c.sig == syscall.SIGTERM && err != nil {
					t.Errorf("SIGTERM ends the agent with %v: %s", err, w.agent.Output())
				}
				w.lives(held, "the agent was away")
				if c.failOpen {
					w.expect(gateOpen)
				} else {
					w.expect(gateShut)
				}
				if ours := w.rules(); (len(ours) == 0) != (c.failOpen && c.sig == syscall.SIGTERM) {
					t.Errorf("rules after the end: %q", ours)
				}
				w.start(flag)
				w.lives(held, "another agent had come")
				w.expect(gateJudged)
			})
		})
	}
}

// rules lists what portcullis has put into iptables, in all families and
// backends.
func (w *world) rules() (ours []string) {
	w.Helper()
	for _, save := range []string{"iptables-nft-save", "iptables-legacy-save", "ip6tables-nft-save", "ip6tables-legacy-save"} {
		for l := range strings.Lines(w.command(save)) {
			if strings.Contains(strings.ToLower(l), "portcullis") && !strings.HasPrefix(l, "#") {
				ours = append(ours, save+": "+strings.TrimSpace(l))
			}
		}
	}
	return ours
}

// TestPolicyChangesWhileAway changes what is in force while no agent runs: the
// next one enforces the new state from its first packet on, pods included that
// weren't isolated before.
func TestPolicyChangesWhileAway(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "away", lab.Routed)
	w.start()
	w.expect(gateJudged)
	w.must(w.stop(syscall.SIGTERM))
	w.apply("db.yaml", policy("b/free", denyIngress))
	w.start()
	w.expect("allow tcp b/free a/db:80\nallow tcp a/db a/web:80\ndeny tcp a/web b/free:80")
}

// TestStartOverStart starts an agent with other flags over the rules that a
// killed one left.
func TestStartOverStart(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "restart", lab.Bridged)
	for _, args := range [][]string{{}, {"--queues=1", "--queue-base=700"}, {"--queues=3"}, {"--mark-bits=0x30000000"}, {"--iptables-backend=legacy"}, {"--iptables-backend=nft"}} {
		w.start(args...)
		w.expect(gateJudged)
		_ = w.stop(syscall.SIGKILL)
	}
}

// TestBackends runs the gate on each backend by name.
func TestBackends(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			w := gateWorld(t, "backend-"+backend, lab.Routed)
			w.start("--iptables-backend", backend)
			w.expect(gateJudged)
			for _, r := range w.rules() {
				if !strings.Contains(r, "tables-"+backend+"-save") {
					t.Errorf("a rule in the wrong backend: %s", r)
				}
			}
		})
	}
}
