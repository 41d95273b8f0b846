package e2e

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"portcullis/bench/lab"
)

// plainShots are what any program with a raw socket can send.
var plainShots = []shot{
	one("UDP", func(d *duel, a *ammo) []byte { return ip4(d.src4, d.dst4, 17, 0, nil, udp(d.src4, d.dst4, a)) }),
	one("UDP over IPv6", func(d *duel, a *ammo) []byte { return ip6(d.src6, d.dst6, 17, 64, udp(d.src6, d.dst6, a)) }),
	tcp4("SYN", 0x02), tcp4("ACK", 0x10), tcp4("SYN-ACK", 0x12), tcp4("RST", 0x04), tcp4("FIN-ACK", 0x11),
	tcp4("without flags", 0), tcp4("SYN-FIN", 0x03), tcp4("all flags", 0x3f),
	tcp6("SYN", 0x02), tcp6("ACK", 0x10), tcp6("SYN-ACK", 0x12), tcp6("RST", 0x04), tcp6("without flags", 0),
	icmpType4(0), icmpType4(3), icmpType4(5), icmpType4(8), icmpType4(13), icmpType4(17), icmpType4(200),
	icmpType6(1, 64), icmpType6(128, 64), icmpType6(129, 64), icmpType6(143, 64), icmpType6(200, 64),
	icmpType6(133, 64), icmpType6(134, 254), icmpType6(135, 64), icmpType6(136, 2), icmpType6(137, 128),
	proto4(0), proto4(2), proto4(4), proto4(6), proto4(17), proto4(33), proto4(41), proto4(47), proto4(50), proto4(51),
	proto4(58), proto4(103), proto4(115), proto4(132), proto4(136), proto4(255),
	proto6(1), proto6(2), proto6(4), proto6(6), proto6(17), proto6(33), proto6(41), proto6(47), proto6(50), proto6(58),
	proto6(59), proto6(132), proto6(135), proto6(139), proto6(255),
	option4("NOP", 1, 1, 1, 1), option4("record route", 7, 7, 4, 0, 0, 0, 0), option4("router alert", 148, 4, 0, 0),
	stray(option4("malformed", 7, 0, 4)),
	chain6("hop-by-hop", 0, func(p []byte) []byte { return ext6(17, 0, p) }),
	chain6("destination", 60, func(p []byte) []byte { return ext6(17, 2, p) }),
	chain6("routing, none left", 43, func(p []byte) []byte { return append([]byte{17, 0, 4, 0, 0, 0, 0, 0}, p...) }),
	chain6("authentication", 51, func(p []byte) []byte { return append([]byte{17, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 15: 0, 23: 0}, p...) }),
	chain6("all kinds", 0, func(p []byte) []byte { return ext6(60, 0, ext6(43, 0, ext6(60, 1, p))) }),
	chain6("destination beyond the copy range", 60, func(p []byte) []byte { return ext6(17, 100, p) }),
	chain6("nine destinations", 60, func(p []byte) []byte {
		for i := range 9 {
			p = ext6(map[bool]byte{true: 17, false: 60}[i == 0], 0, p)
		}
		return p
	}),
	chain6("atomic fragment", 44, func(p []byte) []byte { return frag6(17, 0, 77, p) }),
	{name: "fragments", frames: func(d *duel, a *ammo) [][]byte {
		ipID++
		p := udp(d.src4, d.dst4, a)
		return [][]byte{d.frame(d.toMAC, ip4(d.src4, d.dst4, 17, 0x2000, nil, p[:16])), d.frame(d.toMAC, ip4(d.src4, d.dst4, 17, 2, nil, p[16:]))}
	}},
	stray(shot{name: "tiny first fragment", frames: func(d *duel, a *ammo) [][]byte {
		ipID++
		p := tcp(d.src4, d.dst4, 2, a)
		return [][]byte{d.frame(d.toMAC, ip4(d.src4, d.dst4, 6, 0x2000, nil, p[:8])), d.frame(d.toMAC, ip4(d.src4, d.dst4, 6, 1, nil, p[8:]))}
	}}),
	{name: "IPv6 fragments", frames: func(d *duel, a *ammo) [][]byte {
		p := udp(d.src6, d.dst6, a)
		return [][]byte{
			d.frame(d.toMAC, ip6(d.src6, d.dst6, 44, 64, frag6(17, 1, uint32(a.port), p[:16]))),
			d.frame(d.toMAC, ip6(d.src6, d.dst6, 44, 64, frag6(17, 16, uint32(a.port), p[16:]))),
		}
	}},
	stray(shot{name: "overlapping fragments", frames: func(d *duel, a *ammo) [][]byte {
		ipID++
		p := udp(d.src4, d.dst4, a)
		return [][]byte{
			d.frame(d.toMAC, ip4(d.src4, d.dst4, 17, 0x2000, nil, p[:16])),
			d.frame(d.toMAC, ip4(d.src4, d.dst4, 17, 1, nil, p[8:])),
		}
	}}),
	stray(one("fragment without a first", func(d *duel, a *ammo) []byte {
		ipID++
		return ip4(d.src4, d.dst4, 17, 2, nil, pad(a.tag))
	})),
}

func node4(*duel) netip.Addr   { return lab.NodeIPs[0] }
func node6(*duel) netip.Addr   { return lab.NodeIPs[1] }
func own4(d *duel) netip.Addr  { return d.dst4 }
func own6(d *duel) netip.Addr  { return d.dst6 }
func bridge4(*duel) netip.Addr { return lab.BridgeNets[0].Addr() }
func bridge6(*duel) netip.Addr { return lab.BridgeNets[1].Addr() }

func literal(s string) func(*duel) netip.Addr {
	return func(*duel) netip.Addr { return netip.MustParseAddr(s) }
}

// inwardShots lie about where they come from.
var inwardShots = []shot{
	stray(spoof4("the node", node4)), spoof6("the node", node6),
	spoof4("the victim", own4), spoof6("the victim", own6),
	spoof4("the gateway", bridge4), spoof6("the gateway", bridge6),
	spoof4("nowhere", literal("203.0.113.9")), spoof6("nowhere", literal("2001:db8::9")),
	spoof6("a pod's 4-in-6 address", literal("::ffff:10.1.0.11")), spoof6("its 4-in-6 address", literal("::ffff:10.22.0.11")),
	stray(spoof4("0.0.0.0", literal("0.0.0.0"))), stray(spoof4("loopback", literal("127.0.0.1"))),
	stray(spoof4("multicast", literal("224.0.0.1"))), stray(spoof6("::", literal("::"))),
	stray(spoof6("loopback", literal("::1"))), stray(spoof6("link-local", literal("fe80::99"))),
}

// bridgeShots are frames that only a bridge passes on.
var bridgeShots = []shot{
	tagged("priority tag", 0x8100), tagged("802.1ad priority tag", 0x88a8), tagged6("priority tag", 0x8100),
}

// floodShots are for everybody on the bridge. A pod that may not send does not
// get them out; they come to a pod that may not be reached, whose address they
// don't bear.
var floodShots = []shot{
	flooded("broadcast", "255.255.255.255"), flooded("directed broadcast", "10.22.255.255"), flooded("multicast", "224.0.0.1"),
	flooded("multicast", "ff02::1"),
}

func tagged(name string, vlans ...uint16) shot {
	return shot{name: name, frames: func(d *duel, a *ammo) [][]byte {
		return [][]byte{d.frame(d.toMAC, ip4(d.src4, d.dst4, 17, 0, nil, udp(d.src4, d.dst4, a)), vlans...)}
	}}
}

func tagged6(name string, vlans ...uint16) shot {
	return shot{name: name + " before IPv6", frames: func(d *duel, a *ammo) [][]byte {
		return [][]byte{d.frame(d.toMAC, ip6(d.src6, d.dst6, 17, 64, udp(d.src6, d.dst6, a)), vlans...)}
	}}
}

func flooded(name, to string) shot {
	dst := netip.MustParseAddr(to)
	return shot{name: name + " " + to, frames: func(d *duel, a *ammo) [][]byte {
		all := net.HardwareAddr{255, 255, 255, 255, 255, 255}
		if dst.Is4() {
			return [][]byte{d.frame(all, ip4(d.src4, dst, 17, 0, nil, udp(d.src4, dst, a)))}
		}
		return [][]byte{d.frame(all, ip6(d.src6, dst, 17, 64, udp(d.src6, dst, a)))}
	}}
}

// TestTricks has a pod send all it can think of to one that it must not reach,
// and an isolated pod to one that it must not reach. What gets through while
// there is no policy must not once there is.
func TestTricks(t *testing.T) {
	t.Parallel()
	for name, ends := range map[string][2]string{"in": {"b/free", "a/db"}, "out": {"a/db", "b/free"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bothModes(t, "tricks-"+name, func(t *testing.T, world string, mode lab.Mode) {
				w := gateWorld(t, world, mode)
				w.remove("db.yaml")
				w.start()
				w.expect("allow tcp " + ends[0] + " " + ends[1] + ":80")
				d := newDuel(w, mode, ends[0], ends[1])
				shots := slices.Clone(plainShots)
				if name == "in" {
					shots = append(shots, inwardShots...)
				}
				if mode == lab.Bridged {
					shots = append(shots, bridgeShots...)
					if name == "out" {
						shots = append(shots, floodShots...)
					}
				}
				d.trial(shots)
			})
		})
	}
}
