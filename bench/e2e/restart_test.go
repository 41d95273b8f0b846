package e2e

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// besiege sends datagrams from one pod to where another must not be reached,
// each from a port of its own, and connects, until the returned function is
// called, which gives how many arrived.
func (w *world) besiege(from, to string, port uint16) (stop func() (sent, arrived int)) {
	w.Helper()
	n, err := w.lab.CountUDP(to, port)
	w.must(err)
	var sent int
	end := make(chan struct{})
	var parts sync.WaitGroup
	parts.Go(func() {
		for {
			for _, ip := range w.lab.IPs(to) {
				c, err := w.lab.Open(from, lab.UDP, netip.AddrPortFrom(ip, port), patient)
				if err != nil {
					w.Error(err)
					return
				}
				if _, err := c.Write([]byte("let me in")); err == nil {
					sent++
				}
				c.Close()
			}
			select {
			case <-end:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	})
	return func() (int, int) {
		close(end)
		parts.Wait()
		return sent, n.Count()
	}
}

// TestKilledWhileStarting kills agents at whatever moment of their start, each
// with other flags than the one before it. Nothing that is denied gets by
// meanwhile, and the last agent finds its way from whatever was left.
func TestKilledWhileStarting(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "killed", lab.Routed)
	w.start()
	stop := w.besiege("b/free", "a/db", 5000)
	flags := [][]string{
		{"--queues=1"}, {"--iptables-backend=legacy"}, {"--mark-bits=0x30000000"}, {"--queue-base=300"},
		{"--iptables-backend=nft"}, {"--queues=3"}, {"--iptables-backend=legacy", "--queues=2"}, {},
	}
	for i := range 20 {
		_ = w.stop(syscall.SIGKILL)
		w.launch(flags[i%len(flags)]...)
		time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
	}
	_ = w.stop(syscall.SIGKILL)
	w.start()
	w.expect(gateJudged)
	for range 3 {
		w.must(w.stop(syscall.SIGTERM))
		w.start("--queues=2")
	}
	sent, arrived := stop()
	if sent < 500 || arrived != 0 {
		t.Errorf("of %d datagrams that policy denies, %d arrived", sent, arrived)
	}
	jumps := 0
	for _, r := range w.rules() {
		if strings.Contains(r, "-A FORWARD") || strings.Contains(r, "-A OUTPUT") || strings.Contains(r, "-A POSTROUTING") {
			jumps++
		}
	}
	if jumps != 6 {
		t.Errorf("%d jumps to our chains, of two families with three each: %q", jumps, w.rules())
	}
}

// TestPairsOfDatagrams sends two datagrams at once from each of many sockets, as
// resolvers ask for an address of both families: none is lost to the verdict of
// the other.
func TestPairsOfDatagrams(t *testing.T) {
	t.Parallel()
	bothModes(t, "pairs", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/web", 11, "app=web")
		w.pod(mode, "a/db", 12, "app=db", lab.Port{Proto: lab.TCP, Port: 80})
		w.apply("db.yaml", policy("a/db", `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{ports: [{port: 53, protocol: UDP}]}]}`))
		w.start()
		n, err := w.lab.CountUDP("a/db", 53)
		w.must(err)
		sent := 0
		for range 40 {
			for _, ip := range w.lab.IPs("a/db") {
				c, err := w.lab.Open("a/web", lab.UDP, netip.AddrPortFrom(ip, 53), patient)
				w.must(err)
				for range 2 {
					_, err := c.Write([]byte("a question"))
					w.must(err)
					sent++
				}
				w.must(c.Close())
			}
		}
		w.until("all datagrams arrive", func() error {
			if n.Count() < sent {
				return errNotYet
			}
			return nil
		})
	})
}

// TestMarksOfPods has a pod put the accepted mark on its own packets: marks
// don't leave its network namespace.
func TestMarksOfPods(t *testing.T) {
	t.Parallel()
	bothModes(t, "marks", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start("--mark-bits=0x3000")
		n, err := w.lab.CountUDP("a/db", 5000)
		w.must(err)
		for _, ip := range w.lab.IPs("a/db") {
			w.must(w.lab.Do("b/free", func() error {
				d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
					if control := raw.Control(func(fd uintptr) {
						err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x1000)
					}); control != nil {
						return control
					}
					return err
				}}
				c, err := d.Dial("udp", netip.AddrPortFrom(ip, 5000).String())
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("accepted already"))
				return err
			}))
		}
		w.logged(2, func(d line) bool { return d.Verdict == "deny" && d.Src.Pod == "free" && d.Dst.Port == 5000 })
		if n.Count() != 0 {
			t.Errorf("%d datagrams with a mark got through", n.Count())
		}
	})
}
