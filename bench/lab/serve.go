package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"
)

// Serve starts a server in a pod or host for each port, on each of its
// addresses: TCP and UDP echo what they get, SCTP answers an INIT as an
// association's first step. Ports that aren't served refuse, as is usual.
func (l *Lab) Serve(who string, ports ...Port) error {
	m, err := l.member(who)
	if err != nil {
		return err
	}
	sctp := map[uint16]bool{}
	for _, p := range ports {
		switch p.Proto {
		case TCP:
			err = l.onEachIP(m, func(ip netip.Addr) (io.Closer, error) { return serveTCP(ip, p.Port) })
		case UDP:
			err = l.onEachIP(m, func(ip netip.Addr) (io.Closer, error) { return serveUDP(ip, p.Port, echo) })
		case SCTP:
			sctp[p.Port] = true
		default:
			err = fmt.Errorf("can't serve protocol %q", p.Proto)
		}
		if err != nil {
			return fmt.Errorf("serve %s %d in %s: %w", p.Proto, p.Port, who, err)
		}
	}
	if len(sctp) == 0 {
		return nil
	}
	err = l.onEachIP(m, func(ip netip.Addr) (io.Closer, error) { return serveSCTP(ip, sctp) })
	if err != nil {
		return fmt.Errorf("serve SCTP in %s: %w", who, err)
	}
	return nil
}

// Counter counts the datagrams that reached a port.
type Counter struct {
	n    atomic.Int64
	sent atomic.Int64
}

// Stamp is a payload that tells a Counter when it was sent.
func Stamp() []byte { return binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano())) }

// LastSent gives when the youngest of the stamped datagrams that came was sent, by its
// Stamp. What waits in the kernel for a neighbour's address comes late.
func (c *Counter) LastSent() time.Time { return time.Unix(0, c.sent.Load()) }

func (c *Counter) take(payload []byte) {
	c.n.Add(1)
	if len(payload) != 8 {
		return
	}
	sent := int64(binary.BigEndian.Uint64(payload))
	for {
		last := c.sent.Load()
		if sent <= last || c.sent.CompareAndSwap(last, sent) {
			return
		}
	}
}

// Count gives the number of datagrams so far.
func (c *Counter) Count() int { return int(c.n.Load()) }

// CountUDP starts a server that takes datagrams and never answers.
func (l *Lab) CountUDP(who string, port uint16) (*Counter, error) {
	m, err := l.member(who)
	if err != nil {
		return nil, err
	}
	c := new(Counter)
	count := func(_ net.PacketConn, payload []byte, _ net.Addr) { c.take(payload) }
	if err := l.onEachIP(m, func(ip netip.Addr) (io.Closer, error) { return serveUDP(ip, port, count) }); err != nil {
		return nil, fmt.Errorf("count UDP %d in %s: %w", port, who, err)
	}
	return c, nil
}

// onEachIP starts a server on each address of a member, which closes it when
// it goes.
func (l *Lab) onEachIP(m *member, start func(netip.Addr) (io.Closer, error)) error {
	for _, ip := range m.ips {
		var c io.Closer
		err := m.do(func() (err error) {
			c, err = start(ip)
			return err
		})
		if err != nil {
			return err
		}
		l.mu.Lock()
		m.closers = append(m.closers, c.Close)
		l.mu.Unlock()
	}
	return nil
}

func serveTCP(ip netip.Addr, port uint16) (io.Closer, error) {
	var lc net.ListenConfig
	// Multipath TCP would put options of its own into plain connections.
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(ip, port).String())
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go func() {
					defer c.Close()
					_, _ = io.Copy(c, c)
				}()
			}
		}
	}()
	return ln, nil
}

func echo(c net.PacketConn, b []byte, from net.Addr) { _, _ = c.WriteTo(b, from) }

func serveUDP(ip netip.Addr, port uint16, handle func(net.PacketConn, []byte, net.Addr)) (io.Closer, error) {
	c, err := net.ListenPacket("udp", netip.AddrPortFrom(ip, port).String())
	if err != nil {
		return nil, err
	}
	go readPackets(c, handle)
	return c, nil
}

// readPackets hands each packet to handle until the socket is closed. Errors
// that ICMP messages leave on the socket don't end it.
func readPackets(c net.PacketConn, handle func(net.PacketConn, []byte, net.Addr)) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			handle(c, buf[:n], from)
		}
	}
}

// serveSCTP answers an INIT to one of the ports with an INIT ACK, and one to
// any other with an ABORT. It takes the protocol's packets from a raw socket,
// so that it works on kernels without SCTP sockets.
func serveSCTP(ip netip.Addr, ports map[uint16]bool) (io.Closer, error) {
	c, err := net.ListenPacket(rawNetwork(ip, 132), ip.String())
	if err != nil {
		return nil, err
	}
	go readPackets(c, func(c net.PacketConn, b []byte, from net.Addr) {
		p, ok := parseSCTP(b)
		if !ok || p.chunk != sctpInit {
			return
		}
		answer := sctpPacket{src: p.dst, dst: p.src, vtag: p.initTag, chunk: sctpAbort}
		if ports[p.dst] {
			answer.chunk, answer.initTag = sctpInitAck, p.initTag+1
		}
		_, _ = c.WriteTo(answer.marshal(), from)
	})
	return c, nil
}

// rawNetwork names a raw socket's network as package net wants it.
func rawNetwork(ip netip.Addr, proto int) string {
	if ip.Is4() {
		return "ip4:" + strconv.Itoa(proto)
	}
	return "ip6:" + strconv.Itoa(proto)
}
