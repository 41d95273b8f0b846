package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// beat is how often a pulse sends.
const beat = 20 * time.Millisecond

// pulse is an open connection that carries a byte every beat, and knows when the
// last one arrived.
type pulse struct {
	name string
	last atomic.Int64 // in nanoseconds since 1970
}

func (p *pulse) arrived() { p.last.Store(time.Now().UnixNano()) }

// since tells whether a byte has arrived since then.
func (p *pulse) since(t time.Time) bool { return p.last.Load() > t.UnixNano() }

// feed sends until the connection is closed, whatever becomes of what it sends.
func feed(c net.Conn) {
	for {
		_ = c.SetWriteDeadline(time.Now().Add(beat))
		if _, err := c.Write([]byte("x")); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, unix.ECONNREFUSED) {
			return
		}
		time.Sleep(beat)
	}
}

func isClosed(err error) bool { return strings.Contains(err.Error(), net.ErrClosed.Error()) }

// hear notes what arrives until the connection is closed.
func (p *pulse) hear(c io.Reader) {
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			p.arrived()
		}
		if err == io.EOF || err != nil && isClosed(err) {
			return
		}
	}
}

// Ports of what pulses need of a pod besides its echoes on port 80.
const (
	pushPort   = 7000
	oneWayPort = 7001
)

// pulseServer serves a pod's part of the pulses to it.
type pulseServer struct {
	w       *world
	senders sync.Map // of datagrams: pulses by the sender's address
}

// servePulses has a pod speak first on one port, and listen for datagrams on another.
func (w *world) servePulses(who string) *pulseServer {
	w.Helper()
	s := &pulseServer{w: w}
	for _, ip := range w.lab.IPs(who) {
		var push net.Listener
		var oneWay net.PacketConn
		w.must(w.lab.Do(who, func() (err error) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			if push, err = lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(ip, pushPort).String()); err != nil {
				return err
			}
			oneWay, err = net.ListenPacket("udp", netip.AddrPortFrom(ip, oneWayPort).String())
			return err
		}))
		w.Cleanup(func() { push.Close(); oneWay.Close() })
		go s.speakFirst(push)
		go s.listen(oneWay)
	}
	return s
}

func (s *pulseServer) speakFirst(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			go io.Copy(io.Discard, c)
			feed(c)
		}()
	}
}

// listen notes whose datagrams arrive.
func (s *pulseServer) listen(c net.PacketConn) {
	buf := make([]byte, 64)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil && isClosed(err) {
			return
		}
		if p, ok := s.senders.Load(fmt.Sprint(from)); ok {
			p.(*pulse).arrived()
		}
	}
}

// pulses opens a connection of each kind, in each family: TCP and UDP that are
// echoed, TCP on which the server alone speaks, and UDP that nobody answers.
func (s *pulseServer) pulses(from, to string) (all []*pulse) {
	w := s.w
	w.Helper()
	start := time.Now()
	for _, ip := range w.lab.IPs(to) {
		open := func(kind string, proto lab.Proto, port uint16) (*pulse, net.Conn) {
			c, err := w.lab.Open(from, proto, netip.AddrPortFrom(ip, port), patient)
			w.must(err)
			w.Cleanup(func() { c.Close() })
			p := &pulse{name: fmt.Sprintf("%s %s -> %s", kind, from, ip)}
			all = append(all, p)
			return p, c
		}
		for _, proto := range []lab.Proto{lab.TCP, lab.UDP} {
			p, c := open("echoed "+string(proto), proto, 80)
			go feed(c)
			go p.hear(c)
		}
		p, c := open("server-first TCP", lab.TCP, pushPort)
		go p.hear(c)
		p, c = open("one-way UDP", lab.UDP, oneWayPort)
		s.senders.Store(c.LocalAddr().String(), p)
		go feed(c)
	}
	w.beating(all, start, "they were opened")
	return all
}

// beating waits until each pulse has carried something since then.
func (w *world) beating(all []*pulse, since time.Time, when string) {
	w.Helper()
	w.untilWithin(2*patient, "all connections carry data after "+when, func() error {
		for _, p := range all {
			if !p.since(since) {
				return fmt.Errorf("%s doesn't", p.name)
			}
		}
		return nil
	})
}

// stopped waits for the second that a change is given, and holds that nothing arrives
// after it.
func (w *world) stopped(all []*pulse, change time.Time, what string) {
	w.Helper()
	limit := stalls.after(change, time.Second)
	stalls.after(limit, 600*time.Millisecond)
	for _, p := range all {
		if p.since(limit) {
			w.Errorf("%s: %s still carries data %v later", what, p.name, time.Unix(0, p.last.Load()).Sub(change))
		}
	}
}

// edit changes the objects of a manifest file one by one; "" takes one away.
func (w *world) edit(file string, change func(object string) string) {
	w.Helper()
	b, err := os.ReadFile(filepath.Join(w.dir, file))
	w.must(err)
	objects := strings.Split(string(b), "---\n")
	for i, o := range objects {
		objects[i] = change(o)
	}
	w.apply(file, strings.Join(slices.DeleteFunc(objects, func(o string) bool { return o == "" }), "---\n"))
}

// flows counts the entries of conntrack's table that match.
func (w *world) flows(match func(entry string) bool) (n int) {
	w.Helper()
	for _, family := range []string{"ipv4", "ipv6"} {
		for entry := range strings.Lines(w.command("conntrack", "-L", "-f", family)) {
			if match(entry) {
				n++
			}
		}
	}
	return n
}
