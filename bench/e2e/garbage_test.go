package e2e

import (
	big "encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// sourceOf gives an IP frame's source address, the zero Addr of others and of
// neighbour discovery that no router has forwarded, which passes every gate.
func sourceOf(frame []byte) netip.Addr {
	const ether = 14
	if len(frame) < ether+20 {
		return netip.Addr{}
	}
	ip := frame[ether:]
	switch {
	case big.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IP:
		return netip.AddrFrom4([4]byte(ip[12:16]))
	case big.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IPV6 || len(ip) < 41:
		return netip.Addr{}
	case ip[6] == 58 && ip[7] == 255 && ip[40] >= 133 && ip[40] <= 137:
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte(ip[8:24]))
}

// resized makes a packet's own length what it is, so that routers pass it on.
func resized(p []byte) []byte {
	p = slices.Clone(p)
	if p[0]>>4 == 4 && len(p) >= 20 {
		big.BigEndian.PutUint16(p[2:], uint16(len(p)))
		p[10], p[11] = 0, 0
		big.BigEndian.PutUint16(p[10:], sum16(p[:min(int(p[0]&15)*4, len(p))]))
	}
	if p[0]>>4 == 6 && len(p) >= 40 {
		big.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	}
	return p
}

// samples are whole packets of every shape, from the attacker to the victim.
func (d *duel) samples(a *ammo) [][]byte {
	u4, u6 := udp(d.src4, d.dst4, a), udp(d.src6, d.dst6, a)
	init := append(be16(a.port, 80, 0, 0, 0, 0), 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1)
	return [][]byte{
		ip4(d.src4, d.dst4, 6, 0, nil, tcp(d.src4, d.dst4, 2, a)), ip6(d.src6, d.dst6, 6, 64, tcp(d.src6, d.dst6, 2, a)),
		ip4(d.src4, d.dst4, 17, 0, nil, u4), ip6(d.src6, d.dst6, 17, 64, u6),
		ip4(d.src4, d.dst4, 132, 0, nil, init), ip6(d.src6, d.dst6, 132, 64, init),
		ip4(d.src4, d.dst4, 1, 0, nil, icmp4(8, a)), ip6(d.src6, d.dst6, 58, 64, icmp6(d.src6, d.dst6, 128, a)),
		ip4(d.src4, d.dst4, 17, 0, []byte{7, 7, 4, 0, 0, 0, 0}, u4),
		ip6(d.src6, d.dst6, 0, 64, ext6(60, 0, ext6(43, 0, ext6(60, 1, ext6(17, 0, u6))))),
		ip6(d.src6, d.dst6, 51, 64, append([]byte{17, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 15: 0, 23: 0}, u6...)),
		ip6(d.src6, d.dst6, 44, 64, frag6(17, 0, 9, u6)),
	}
}

// garbage is what a pod with a raw socket can make up.
func (d *duel) garbage(a *ammo, r *rand.Rand) (packets [][]byte) {
	add := func(p []byte) { packets = append(packets, p) }
	for _, p := range d.samples(a) {
		for n := 1; n < len(p); n++ { // every truncation, told and untold
			add(p[:n])
			add(resized(p[:n]))
		}
		for range 150 { // damage anywhere but in the addresses
			b := slices.Clone(p)
			for range 1 + r.IntN(3) {
				if at := r.IntN(len(b)); b[0]>>4 == 4 && (at < 12 || at >= 20) || b[0]>>4 == 6 && (at < 8 || at >= 40) {
					b[at] = byte(r.Uint32())
				}
			}
			add(b)
			add(resized(b))
		}
	}
	for n := range 256 { // every protocol, with nothing in it and with something
		for _, body := range [][]byte{nil, make([]byte, 3), pad(a.tag)} {
			add(ip4(d.src4, d.dst4, byte(n), 0, nil, body))
			add(ip6(d.src6, d.dst6, byte(n), 64, body))
		}
	}
	packets = append(packets, d.fragments(a)...)
	for _, n := range []int{1, 60, 127, 255} { // chains of extension headers beyond the copy range
		add(ip6(d.src6, d.dst6, 60, 64, ext6(17, n%180, udp(d.src6, d.dst6, a))))
		chain := udp(d.src6, d.dst6, a)
		for i := range min(n, 100) {
			chain = ext6(map[bool]byte{true: 17, false: 60}[i == 0], 0, chain)
		}
		add(ip6(d.src6, d.dst6, 60, 64, chain))
	}
	return packets
}

// fragments are overlapping, tiny, out of place, and never complete.
func (d *duel) fragments(a *ammo) (packets [][]byte) {
	t4, t6 := tcp(d.src4, d.dst4, 2, a), tcp(d.src6, d.dst6, 2, a)
	for n := 8; n < len(t4); n += 8 {
		for _, at := range []int{n - 8, n, n + 8, 8100} { // what comes second: over the first, in place, with a gap, beyond all
			ipID++
			id := uint32(a.port)<<16 | uint32(ipID)
			packets = append(packets,
				ip4(d.src4, d.dst4, 6, 0x2000, nil, t4[:n]), ip4(d.src4, d.dst4, 6, uint16(at/8), nil, t4[n:]),
				ip6(d.src6, d.dst6, 44, 64, frag6(6, 1, id, t6[:n])), ip6(d.src6, d.dst6, 44, 64, frag6(6, uint16(at&^7), id, t6[n:])))
		}
		ipID++
		packets = append(packets, ip4(d.src4, d.dst4, 6, 0x2000, nil, t4[:n]), ip6(d.src6, d.dst6, 44, 64, frag6(6, 1, uint32(ipID), t6[:n])))
	}
	return packets
}

// volley sends the packets, and gives how many left.
func (d *duel) volley(packets [][]byte) (sent int) {
	d.Helper()
	fd := d.packetSocket(d.from, 0)
	defer unix.Close(fd)
	for i, p := range packets {
		f := d.frame(d.toMAC, p)
		if len(f) > 1514 {
			continue
		}
		if _, err := unix.Write(fd, f); err == nil {
			sent++
		}
		if i%100 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	return sent
}

// giant sends segments that are far longer than the wire takes, which the kernel
// cuts behind the gate (struct virtio_net_hdr, as PACKET_VNET_HDR has it before the
// frame).
func (d *duel) giant(a *ammo, size int) {
	d.Helper()
	fd := d.packetSocket(d.from, 0)
	defer unix.Close(fd)
	d.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	for v, p := range [][]byte{
		ip4(d.src4, d.dst4, 6, 0, nil, append(tcp(d.src4, d.dst4, 0x18, a), make([]byte, size)...)),
		ip6(d.src6, d.dst6, 6, 64, append(tcp(d.src6, d.dst6, 0x18, a), make([]byte, size)...)),
	} {
		frame := d.frame(d.toMAC, p)
		start, kind := 14+20+20*v, byte([]int{1, 4}[v]) // VIRTIO_NET_HDR_GSO_TCPV4, _TCPV6
		head := []byte{1, kind}                         // the checksum is still to be made
		for _, n := range []int{start + 20, 1400, start, 16} {
			head = big.NativeEndian.AppendUint16(head, uint16(n))
		}
		_, err := unix.Write(fd, append(head, frame...))
		d.must(err)
	}
}

// heardOf gives how many packets from the attacker came to the victim.
func (d *duel) heardOf() int {
	time.Sleep(100 * time.Millisecond)
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.heardFrom[d.src4] + d.heardFrom[d.src6]
}

// TestFaultGarbage has a pod send garbage to a pod that it must not reach, or from one
// that must reach nobody. A great deal of it arrives while there is no policy, and
// nothing once there is one; each packet that comes to the agent has a verdict and a
// record, and nothing disturbs it.
func TestFaultGarbage(t *testing.T) {
	for name, ends := range map[string][2]string{"in": {"b/free", "a/db"}, "out": {"a/db", "b/free"}} {
		t.Run(name, func(t *testing.T) {
			bothModes(t, "garbage-"+name, func(t *testing.T, world string, mode lab.Mode) {
				w := gateWorld(t, world, mode)
				w.remove("db.yaml")
				w.start("--decision-log-window=10s")
				w.expect("allow tcp " + ends[0] + " " + ends[1] + ":80")
				d := newDuel(w, mode, ends[0], ends[1])
				r := rand.New(rand.NewPCG(7, uint64(mode)))
				d.volley(d.garbage(&ammo{tag: []byte("open"), port: 21000}, r))
				d.giant(&ammo{tag: []byte("open"), port: 21000}, 30_000)
				open := d.heardOf()
				if open < 1000 {
					t.Fatalf("without policy %d packets arrive", open)
				}
				w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`))
				w.settle("deny tcp " + d.from + " " + d.to + ":80")
				w.command("conntrack", "-F")
				before := d.heardOf()
				sent := d.volley(d.garbage(&ammo{tag: []byte("shut"), port: 22000}, r))
				d.giant(&ammo{tag: []byte("shut"), port: 22000}, 30_000)
				through := d.heardOf() - before
				chaos.Report(t, chaos.Row{Fault: fmt.Sprintf("garbage, %s, %s", name, mode), Load: "-", Tried: sent, Wrong: through, Lost: w.unaccounted(),
					Note: fmt.Sprintf("%d arrived without policy; malformed %.0f, truncated %.0f, fragment %.0f, no-rule %.0f", open,
						w.metricSum("decisions_total", "malformed"), w.metricSum("decisions_total", "truncated"),
						w.metricSum("decisions_total", "fragment"), w.metricSum("decisions_total", "no-rule"))})
				if n := w.metricSum("portcullis_queue_errors_total"); n != 0 {
					t.Errorf("%.0f errors of queues", n)
				}
				w.expect("deny udp " + d.from + " " + d.to + ":80\nallow tcp a/web a/db:80")
			})
		})
	}
}
