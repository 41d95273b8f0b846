package filter

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/florianl/go-nfqueue/v2"
)

// kernelSocket opens a UDP socket of a pod's. It stays the pod's wherever the
// test goes.
func kernelSocket(t *testing.T, pod kernelPod, network string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	kernelIn(t, pod.ns, func() {
		var err error
		c, err = net.ListenUDP(network, nil)
		kernelOK(t, err)
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// kernelTarget gives where a socket of a pod can be reached.
func kernelTarget(addr string, c *net.UDPConn) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
}

// kernelRecv reads datagrams until want have come, or none has for a while,
// and counts them by text.
func kernelRecv(t *testing.T, c *net.UDPConn, want int) map[string]int {
	t.Helper()
	got := map[string]int{}
	buf := make([]byte, 64)
	for n := 0; n < want+1; n++ {
		wait := 2 * time.Second // for those that are to come
		if n == want {
			wait = 100 * time.Millisecond // for one that isn't
		}
		kernelOK(t, c.SetReadDeadline(time.Now().Add(wait)))
		size, _, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		kernelOK(t, err)
		got[string(buf[:size])]++
	}
	return got
}

// kernelSend sends one datagram to each of the targets.
func kernelSend(t *testing.T, c *net.UDPConn, text string, targets ...netip.AddrPort) {
	t.Helper()
	for _, to := range targets {
		_, err := c.WriteToUDPAddrPort([]byte(text), to)
		kernelOK(t, err)
	}
}

// TestNothingPassesMeanwhile floods a node that has nobody on its queues while
// rules are installed and repaired ten times over with each backend. Not one packet of or to the
// isolated pod may pass; those between the others pass.
func TestNothingPassesMeanwhile(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		shut := kernelAddPod(t, "shut", "10.0.0.1", "fd00::1")
		free := kernelAddPod(t, "free", "10.0.0.2", "fd00::2")
		sink := kernelAddPod(t, "sink", "10.0.0.3", "fd00::3")
		k := kernelNew(t, backend)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())

		// What is not to come has sockets of its own, that others' packets
		// can't fill.
		never := []*net.UDPConn{kernelSocket(t, sink, "udp"), kernelSocket(t, shut, "udp")}
		always := kernelSocket(t, sink, "udp")
		fromShut, fromFree := kernelSocket(t, shut, "udp"), kernelSocket(t, free, "udp")
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				for _, a := range []string{sink.v4, sink.v6} {
					fromShut.WriteToUDPAddrPort([]byte("from shut"), kernelTarget(a, never[0]))
					fromFree.WriteToUDPAddrPort([]byte("free"), kernelTarget(a, always))
				}
				for _, a := range []string{shut.v4, shut.v6} {
					fromFree.WriteToUDPAddrPort([]byte("to shut"), kernelTarget(a, never[1]))
				}
			}
		}()
		for i := range 10 {
			if i%2 == 0 {
				kernelOK(t, k.Install())
			} else {
				kernelBreak(t, backend, "IPT -A FORWARD -j PORTCULLIS-FWD-GEN; IPT -A PORTCULLIS-FWD-GEN -j RETURN; IPT -N PORTCULLIS-FWD-77", 4, 6)
				if _, err := k.Repair(); err != nil {
					t.Fatal(err)
				}
			}
			// Another pod comes and goes in the sets meanwhile.
			kernelOK(t, k.SetIsolated(append(kernelMany(i%3), kernelAddrs("10.0.0.1 fd00::1")...)))
		}
		close(stop)
		<-done
		for _, sock := range never {
			if got := kernelRecv(t, sock, 0); len(got) > 0 {
				t.Errorf("passed an isolated pod's gate: %v", got)
			}
		}
		if got := kernelRecv(t, always, 20); got["free"] < 20 {
			t.Errorf("between pods that aren't isolated passed only %v", got)
		}
	})
}

// kernelListen accepts whatever comes to queue 100 with the mark, and counts.
func kernelListen(t *testing.T, mark uint32) *atomic.Int64 {
	t.Helper()
	q, err := nfqueue.Open(&nfqueue.Config{NfQueue: 100, MaxPacketLen: 128, MaxQueueLen: 64, Copymode: nfqueue.NfQnlCopyPacket})
	kernelOK(t, err)
	var queued atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); q.Close() })
	kernelOK(t, q.RegisterWithErrorFunc(ctx, func(a nfqueue.Attribute) int {
		queued.Add(1)
		q.SetVerdictWithOption(*a.PacketID, nfqueue.NfAccept, nfqueue.WithMark(mark))
		return 0
	}, func(error) int { return 0 }))
	return &queued
}

// TestMarksDecide: of a one-way stream that was accepted with the mark one
// packet is queued and no more, the mark doesn't stay on packets, and once the
// connection is revoked nothing of it passes, not even an answer.
func TestMarksDecide(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		shut := kernelAddPod(t, "shut", "10.0.0.1", "fd00::1")
		sink := kernelAddPod(t, "sink", "10.0.0.3", "fd00::3")
		k := kernelNew(t, backend, func(c *KernelConfig) { c.Queues = 1 })
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
		kernelBoth(t, backend, "IPT -A POSTROUTING -m mark --mark 0x1000/0x1000")
		queued := kernelListen(t, AcceptedMark(DefaultMarkBits))

		for _, c := range []struct{ network, addr, own, family string }{
			{"udp4", sink.v4, shut.v4, "ipv4"},
			{"udp6", sink.v6, shut.v6, "ipv6"},
		} {
			from, to := kernelSocket(t, shut, c.network), kernelSocket(t, sink, c.network)
			target := kernelTarget(c.addr, to)
			queued.Store(0)
			for range 5 {
				kernelSend(t, from, "x", target)
				if got := kernelRecv(t, to, 1); got["x"] != 1 {
					t.Fatalf("%s: an accepted packet didn't arrive: %v", c.network, got)
				}
			}
			if n := queued.Load(); n != 1 {
				t.Errorf("%s: of five packets %d were queued, want one", c.network, n)
			}
			kernelRun(t, "conntrack -U -f "+c.family+" -p udp --dport "+strconv.Itoa(int(target.Port()))+" -m 0x2000/0x2000 2>&1")
			kernelSend(t, from, "revoked", target)
			kernelSend(t, to, "revoked", kernelTarget(c.own, from))
			if got := kernelRecv(t, to, 0); len(got) > 0 {
				t.Errorf("%s: of a revoked connection passed %v", c.network, got)
			}
			if got := kernelRecv(t, from, 0); len(got) > 0 {
				t.Errorf("%s: of a revoked connection an answer passed: %v", c.network, got)
			}
		}
		for _, bin := range []string{"iptables-", "ip6tables-"} {
			out := kernelRun(t, bin+backend+" -t mangle -L POSTROUTING -v -n -x | tail -n 1")
			if strings.Fields(out)[0] != "0" {
				t.Errorf("packets left with a mark on them: %s", out)
			}
		}
	})
}

// TestUntrackedIsJudged: a NOTRACK rule doesn't open the gate.
func TestUntrackedIsJudged(t *testing.T) {
	kernelNetns(t)
	shut := kernelAddPod(t, "shut", "10.0.0.1", "fd00::1")
	free := kernelAddPod(t, "free", "10.0.0.2", "fd00::2")
	sink := kernelAddPod(t, "sink", "10.0.0.3", "fd00::3")
	k := kernelNew(t, backendNFT)
	kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
	kernelOK(t, k.Install())
	kernelRun(t, "iptables-nft -t raw -A PREROUTING -j NOTRACK")
	from, other, to := kernelSocket(t, shut, "udp4"), kernelSocket(t, free, "udp4"), kernelSocket(t, sink, "udp4")
	kernelSend(t, from, "shut", kernelTarget(sink.v4, to))
	kernelSend(t, other, "free", kernelTarget(sink.v4, to))
	if got := kernelRecv(t, to, 1); got["shut"] != 0 || got["free"] != 1 {
		t.Errorf("untracked packets that passed: %v, want free's only", got)
	}
}

// TestFailOpen: with nobody on the queues everything passes, and only then.
func TestFailOpen(t *testing.T) {
	for _, open := range []bool{false, true} {
		t.Run("fail-open="+strconv.FormatBool(open), func(t *testing.T) {
			kernelNetns(t)
			shut := kernelAddPod(t, "shut", "10.0.0.1", "fd00::1")
			sink := kernelAddPod(t, "sink", "10.0.0.3", "fd00::3")
			k := kernelNew(t, backendNFT, func(c *KernelConfig) { c.FailOpen = open })
			kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
			kernelOK(t, k.Install())
			from, to := kernelSocket(t, shut, "udp4"), kernelSocket(t, sink, "udp4")
			kernelSend(t, from, "x", kernelTarget(sink.v4, to))
			want := 0
			if open {
				want = 1
			}
			if got := kernelRecv(t, to, want); got["x"] != want {
				t.Errorf("got %v, want %d", got, want)
			}
		})
	}
}
