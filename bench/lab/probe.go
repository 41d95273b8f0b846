package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Outcome is what became of a probe.
type Outcome int

// The outcomes. Refused is an answer too: the packet arrived, and nobody
// listens there.
const (
	Failed Outcome = iota // the probe could not be made, and says nothing
	Connected
	Refused
	TimedOut
)

// String gives the outcome's word.
func (o Outcome) String() string {
	return [...]string{"failed", "connected", "refused", "timed-out"}[o]
}

// Reached tells whether the probe came to its destination.
func (o Outcome) Reached() bool { return o == Connected || o == Refused }

// Timeout is how long a probe waits when it doesn't say: longer than any
// verdict takes, and shorter than the second after which TCP sends another SYN.
const Timeout = 400 * time.Millisecond

// Probe is one connection to try. A Timeout of zero is the package's Timeout.
type Probe struct {
	From    string
	To      netip.Addr
	Proto   Proto
	Port    uint16
	Timeout time.Duration
}

// Result is what became of a Probe; Err says more about all outcomes but
// Connected.
type Result struct {
	Outcome Outcome
	Err     error
}

// Try makes one connection: TCP connects and has a word echoed, UDP has a
// datagram echoed, SCTP sends an INIT and waits for the answer, ICMP has an
// echo request answered.
func (l *Lab) Try(p Probe) Result {
	if p.Timeout == 0 {
		p.Timeout = Timeout
	}
	var err error
	switch p.Proto {
	case TCP, UDP:
		err = l.tryEcho(p)
	case SCTP:
		err = l.trySCTP(p)
	case ICMP:
		err = l.tryPing(p)
	default:
		err = fmt.Errorf("can't probe protocol %q", p.Proto)
	}
	return Result{Outcome: outcome(err), Err: err}
}

// TryAll makes many connections, some dozens at a time, and gives their results
// in order.
func (l *Lab) TryAll(probes []Probe) []Result {
	results := make([]Result, len(probes))
	slots := make(chan struct{}, 48)
	var wg sync.WaitGroup
	for i, p := range probes {
		slots <- struct{}{}
		wg.Go(func() {
			results[i] = l.Try(p)
			<-slots
		})
	}
	wg.Wait()
	return results
}

// outcome sorts the errors of the network from those of the probe.
func outcome(err error) Outcome {
	var timeout net.Error
	switch {
	case err == nil:
		return Connected
	// ICMP's "protocol unreachable" comes as ENOPROTOOPT; an echo server that
	// resets an accepted connection was reached as well.
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOPROTOOPT), errors.Is(err, unix.ECONNRESET):
		return Refused
	case errors.As(err, &timeout) && timeout.Timeout():
		return TimedOut
	}
	return Failed
}

// Conn is a connection that was opened in a member's namespace and may be used
// later, from anywhere.
type Conn struct{ net.Conn }

// Open connects, TCP or UDP, and keeps the connection. The caller closes it.
func (l *Lab) Open(from string, proto Proto, to netip.AddrPort, timeout time.Duration) (*Conn, error) {
	network := map[Proto]string{TCP: "tcp", UDP: "udp"}[proto]
	var c net.Conn
	err := l.Do(from, func() (err error) {
		c, err = dial(network, to.String(), timeout)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Conn{c}, nil
}

// OpenFrom is Open from a given address and port.
func (l *Lab) OpenFrom(who string, proto Proto, from, to netip.AddrPort, timeout time.Duration) (*Conn, error) {
	var c net.Conn
	err := l.Do(who, func() (err error) {
		d := net.Dialer{Timeout: timeout, KeepAlive: -1, LocalAddr: net.TCPAddrFromAddrPort(from)}
		if proto == UDP {
			d.LocalAddr = net.UDPAddrFromAddrPort(from)
		}
		d.SetMultipathTCP(false)
		c, err = d.DialContext(context.Background(), map[Proto]string{TCP: "tcp", UDP: "udp"}[proto], to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Conn{c}, nil
}

// dial connects to a literal address, for which package net makes the socket on
// the calling thread.
func dial(network, to string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout, KeepAlive: -1}
	d.SetMultipathTCP(false)
	return d.DialContext(context.Background(), network, to)
}

// Exchange sends a word and waits until it has come back.
func (c *Conn) Exchange(word string, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	back := make([]byte, len(word))
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if string(back) != word {
		return fmt.Errorf("sent %q, got %q back", word, back)
	}
	return nil
}

func (l *Lab) tryEcho(p Probe) error {
	c, err := l.Open(p.From, p.Proto, netip.AddrPortFrom(p.To, p.Port), p.Timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Exchange(fmt.Sprintf("%016x", rand.Uint64()), p.Timeout)
}

// trySCTP sends one INIT from a random port and takes what comes back to it.
func (l *Lab) trySCTP(p Probe) error {
	init := sctpPacket{
		src: uint16(32768 + rand.IntN(28000)), dst: p.Port, chunk: sctpInit, initTag: rand.Uint32() | 1,
	}
	return l.ask(p, 132, 132, init.marshal(), func(b []byte) (bool, error) {
		a, ok := parseSCTP(b)
		if !ok || a.src != init.dst || a.dst != init.src || a.vtag != init.initTag {
			return false, nil
		}
		if a.chunk == sctpAbort {
			return true, unix.ECONNREFUSED
		}
		return a.chunk == sctpInitAck, nil
	})
}

// tryPing sends one echo request with a random identifier (RFC 792, RFC 4443).
func (l *Lab) tryPing(p Probe) error {
	request, reply := byte(8), byte(0)
	if p.To.Is6() {
		request, reply = 128, 129
	}
	b := make([]byte, 8, 24)
	b[0] = request
	binary.BigEndian.PutUint32(b[4:], rand.Uint32())
	b = append(b, "sixteen bytes..."...)
	if p.To.Is4() { // of ICMPv6 the kernel makes the sum
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return l.ask(p, 1, 58, b, func(a []byte) (bool, error) {
		return len(a) >= 8 && a[0] == reply && string(a[4:8]) == string(b[4:8]), nil
	})
}

// ask sends one raw packet of proto4 or proto6 and reads until isAnswer says
// that the answer has come.
func (l *Lab) ask(p Probe, proto4, proto6 int, packet []byte, isAnswer func([]byte) (bool, error)) error {
	proto := proto4
	if p.To.Is6() {
		proto = proto6
	}
	var c net.Conn
	err := l.Do(p.From, func() (err error) {
		c, err = dial(rawNetwork(p.To, proto), p.To.String(), p.Timeout)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(p.Timeout)); err != nil {
		return err
	}
	if _, err := c.Write(packet); err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for {
		// ReadFromIP, unlike Read, leaves the IPv4 header out.
		n, _, err := c.(*net.IPConn).ReadFromIP(buf)
		if err != nil {
			return err
		}
		if done, err := isAnswer(buf[:n]); done || err != nil {
			return err
		}
	}
}

// checksum is the Internet checksum of RFC 1071 over an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
