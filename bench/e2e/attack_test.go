package e2e

import (
	"bytes"
	"context"
	big "encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// duel is one pod that sends whatever it likes, frame by frame, and another
// that notes what comes to its interface, whatever its own kernel makes of it.
type duel struct {
	*world
	from, to             string
	mode                 lab.Mode
	fromMAC, toMAC       net.HardwareAddr
	src4, dst4           netip.Addr
	src6, dst6           netip.Addr
	mu                   sync.Mutex
	heard                []byte
	heardFrom            map[netip.Addr]int // IP packets by their source, neighbour discovery apart
	ear                  int
	listening, listenEnd chan struct{}
}

// newDuel opens the victim's ear. The attacker's frames are addressed as its
// own kernel would address them: to the node, or on the bridge to the victim.
func newDuel(w *world, mode lab.Mode, from, to string) *duel {
	w.Helper()
	d := &duel{
		world: w, from: from, to: to, mode: mode,
		src4: w.lab.IP4(from), dst4: w.lab.IP4(to), src6: w.lab.IP6(from), dst6: w.lab.IP6(to),
		heardFrom: map[netip.Addr]int{},
		listening: make(chan struct{}), listenEnd: make(chan struct{}),
	}
	d.fromMAC, d.toMAC = w.mac(from), w.mac(to)
	if mode == lab.Routed {
		out, err := w.lab.Command(context.Background(), from, "ip", "neigh", "show", "to", "169.254.1.1")
		w.must(err)
		_, lladdr, _ := strings.Cut(out, "lladdr ")
		d.toMAC, err = net.ParseMAC(strings.Fields(lladdr + " none")[0])
		w.must(err)
	}
	d.listen()
	return d
}

func (w *world) mac(who string) (mac net.HardwareAddr) {
	w.Helper()
	w.must(w.lab.Do(who, func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = i.HardwareAddr
		}
		return err
	}))
	return mac
}

// packetSocket opens a packet socket on a pod's eth0.
func (w *world) packetSocket(who string, proto uint16) (fd int) {
	w.Helper()
	w.must(w.lab.Do(who, func() error {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		order := proto<<8 | proto>>8 // network byte order
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(order))
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: order, Ifindex: i.Index})
	}))
	return fd
}

// listen notes every frame that comes to the victim, until the test ends.
func (d *duel) listen() {
	d.ear = d.packetSocket(d.to, unix.ETH_P_ALL)
	tv := unix.Timeval{Usec: 50_000}
	d.must(unix.SetsockoptTimeval(d.ear, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	go func() {
		defer close(d.listenEnd)
		buf := make([]byte, 64<<10)
		for {
			select {
			case <-d.listening:
				return
			default:
			}
			n, from, err := unix.Recvfrom(d.ear, buf, 0)
			ll, ok := from.(*unix.SockaddrLinklayer)
			if err != nil || !ok || ll.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			d.mu.Lock()
			d.heard = append(append(d.heard, buf[:n]...), 0)
			d.heardFrom[sourceOf(buf[:n])]++
			d.mu.Unlock()
		}
	}()
	d.Cleanup(func() { close(d.listening); <-d.listenEnd; unix.Close(d.ear) })
}

func (d *duel) hears(tag string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Contains(d.heard, []byte(tag))
}

// fire sends the frames of each shot with the round's tags in them.
func (d *duel) fire(shots []shot, round int) (tags []string) {
	d.Helper()
	fd := d.packetSocket(d.from, 0)
	defer unix.Close(fd)
	for i, s := range shots {
		tag := fmt.Sprintf("<%d.%d>", round, i)
		tags = append(tags, tag)
		for _, f := range s.frames(d, &ammo{tag: []byte(fmt.Sprintf("%-16s", tag)), port: uint16(20000 + 500*round + i)}) {
			if _, err := unix.Write(fd, f); err != nil {
				d.Fatalf("%s: %v", s.name, err)
			}
		}
		time.Sleep(time.Millisecond)
	}
	return tags
}

// ammo is what differs between a shot's rounds: a text to know it by, and a
// port, lest conntrack remember the round before.
type ammo struct {
	tag  []byte
	port uint16
}

// shot is one trick.
type shot struct {
	name   string
	frames func(*duel, *ammo) [][]byte
	// stray is set where not even an open node would deliver it.
	stray bool
}

// frame puts an Ethernet header before a packet; tags come between.
func (d *duel) frame(to net.HardwareAddr, packet []byte, vlans ...uint16) []byte {
	b := slices.Concat(to, d.fromMAC)
	for _, v := range vlans {
		b = big.BigEndian.AppendUint16(b, v)
		b = append(b, 0, 0) // priority and identifier zero
	}
	typ := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		typ = unix.ETH_P_IPV6
	}
	return append(big.BigEndian.AppendUint16(b, typ), packet...)
}

func sum16(bs ...[]byte) uint16 {
	var sum uint32
	for i, c := range slices.Concat(bs...) {
		sum += uint32(c) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func be16(ns ...uint16) (b []byte) {
	for _, n := range ns {
		b = big.BigEndian.AppendUint16(b, n)
	}
	return b
}

var ipID uint16

// ip4 builds a packet. fragment is the flags and offset word; the options are
// padded.
func ip4(src, dst netip.Addr, proto byte, fragment uint16, options, payload []byte) []byte {
	for len(options)%4 != 0 {
		options = append(slices.Clip(options), 0)
	}
	head := 20 + len(options)
	b := slices.Concat([]byte{0x40 | byte(head/4), 0}, be16(uint16(head+len(payload)), ipID, fragment),
		[]byte{64, proto, 0, 0}, src.AsSlice(), dst.AsSlice(), options)
	big.BigEndian.PutUint16(b[10:], sum16(b))
	return append(b, payload...)
}

func ip6(src, dst netip.Addr, next, hops byte, payload []byte) []byte {
	return slices.Concat([]byte{0x60, 0, 0, 0}, be16(uint16(len(payload))), []byte{next, hops}, src.AsSlice(), dst.AsSlice(), payload)
}

// summed puts a transport checksum over the pseudo header in place.
func summed(src, dst netip.Addr, proto byte, b []byte, at int) []byte {
	c := sum16(src.AsSlice(), dst.AsSlice(), be16(0, uint16(len(b))), []byte{0, proto}, b)
	big.BigEndian.PutUint16(b[at:], c)
	return b
}

func udp(src, dst netip.Addr, a *ammo) []byte {
	return summed(src, dst, 17, append(be16(a.port, a.port, uint16(8+len(a.tag)), 0), a.tag...), 6)
}

func tcp(src, dst netip.Addr, flags byte, a *ammo) []byte {
	b := slices.Concat(be16(a.port, a.port, 1, 2, 3, 4), []byte{5 << 4, flags}, be16(1000, 0, 0), a.tag)
	return summed(src, dst, 6, b, 16)
}

func icmp4(typ byte, a *ammo) []byte {
	b := append([]byte{typ, 0, 0, 0, byte(a.port >> 8), byte(a.port), 0, 1}, a.tag...)
	big.BigEndian.PutUint16(b[2:], sum16(b))
	return b
}

func icmp6(src, dst netip.Addr, typ byte, a *ammo) []byte {
	return summed(src, dst, 58, append([]byte{typ, 0, 0, 0, byte(a.port >> 8), byte(a.port), 0, 1}, a.tag...), 2)
}

// ext6 is an extension header of 8 bytes and so many further eights, padded.
func ext6(next byte, eights int, rest []byte) []byte {
	b := make([]byte, 8+8*eights)
	b[0], b[1] = next, byte(eights)
	for at := 2; at < len(b); { // PadN options
		n := min(len(b)-at-2, 255)
		if n < 0 {
			b[at] = 0
			break
		}
		b[at], b[at+1] = 1, byte(n)
		at += 2 + n
	}
	return append(b, rest...)
}

func frag6(next byte, offset uint16, id uint32, rest []byte) []byte {
	return append(big.BigEndian.AppendUint32(append([]byte{next, 0}, be16(offset)...), id), rest...)
}

// one makes a shot of one IPv4 packet, six one of IPv6.
func one(name string, packet func(d *duel, a *ammo) []byte) shot {
	return shot{name: name, frames: func(d *duel, a *ammo) [][]byte { return [][]byte{d.frame(d.toMAC, packet(d, a))} }}
}

func stray(s shot) shot { s.stray = true; return s }

func proto4(n byte) shot {
	return one(fmt.Sprint("protocol ", n, " in IPv4"), func(d *duel, a *ammo) []byte { return ip4(d.src4, d.dst4, n, 0, nil, pad(a.tag)) })
}

func proto6(n byte) shot {
	return one(fmt.Sprint("protocol ", n, " in IPv6"), func(d *duel, a *ammo) []byte { return ip6(d.src6, d.dst6, n, 64, pad(a.tag)) })
}

func pad(tag []byte) []byte { return append(make([]byte, 24), tag...) }

func tcp4(name string, flags byte) shot {
	return one("TCP "+name, func(d *duel, a *ammo) []byte {
		return ip4(d.src4, d.dst4, 6, 0, nil, tcp(d.src4, d.dst4, flags, a))
	})
}

func tcp6(name string, flags byte) shot {
	return one("TCP over IPv6 "+name, func(d *duel, a *ammo) []byte {
		return ip6(d.src6, d.dst6, 6, 64, tcp(d.src6, d.dst6, flags, a))
	})
}

// spoof4 sends a datagram in another's name.
func spoof4(name string, src func(*duel) netip.Addr) shot {
	return one("from "+name, func(d *duel, a *ammo) []byte {
		return ip4(src(d), d.dst4, 17, 0, nil, udp(src(d), d.dst4, a))
	})
}

func spoof6(name string, src func(*duel) netip.Addr) shot {
	return one("over IPv6 from "+name, func(d *duel, a *ammo) []byte {
		return ip6(src(d), d.dst6, 17, 64, udp(src(d), d.dst6, a))
	})
}

func icmpType4(typ byte) shot {
	return one(fmt.Sprint("ICMP type ", typ), func(d *duel, a *ammo) []byte { return ip4(d.src4, d.dst4, 1, 0, nil, icmp4(typ, a)) })
}

func icmpType6(typ, hops byte) shot {
	return one(fmt.Sprint("ICMPv6 type ", typ, " hop limit ", hops), func(d *duel, a *ammo) []byte {
		return ip6(d.src6, d.dst6, 58, hops, icmp6(d.src6, d.dst6, typ, a))
	})
}

// chain6 sends a datagram behind extension headers.
func chain6(name string, first byte, headers func(datagram []byte) []byte) shot {
	return one("IPv6 "+name, func(d *duel, a *ammo) []byte {
		return ip6(d.src6, d.dst6, first, 64, headers(udp(d.src6, d.dst6, a)))
	})
}

func option4(name string, o ...byte) shot {
	return one("IPv4 option "+name, func(d *duel, a *ammo) []byte { return ip4(d.src4, d.dst4, 17, 0, o, udp(d.src4, d.dst4, a)) })
}

// trial fires the shots before there is a policy, when all but strays arrive,
// and after, when none does.
func (d *duel) trial(shots []shot) {
	d.Helper()
	for i, tag := range d.fire(shots, 0) {
		if shots[i].stray {
			continue
		}
		d.until(shots[i].name+" arrives, without policy", func() error {
			if !d.hears(tag) {
				return errNotYet
			}
			return nil
		})
	}
	d.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], `+
		`ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`))
	d.settle("deny tcp " + d.from + " " + d.to + ":80")
	d.command("conntrack", "-F")
	tags := d.fire(shots, 1)
	d.expect("deny udp " + d.from + " " + d.to + ":80\nallow tcp a/web a/db:80")
	for i, tag := range tags {
		if d.hears(tag) {
			d.Errorf("%s: gets through", shots[i].name)
		}
	}
}
