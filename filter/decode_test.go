package filter

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"portcullis/verdict"
)

// Packets for the tests, outermost layer first. Lengths and checksums are right
// unless a mangle says otherwise.

func decPacket(parts ...gopacket.SerializableLayer) []byte {
	b := gopacket.NewSerializeBuffer()
	o := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: false}
	if err := gopacket.SerializeLayers(b, o, parts...); err != nil {
		panic(err)
	}
	return slices.Clone(b.Bytes())
}

func dec4(proto verdict.Protocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocol(proto),
		SrcIP: net.IPv4(10, 0, 0, 1).To4(), DstIP: net.IPv4(10, 0, 0, 2).To4()}
}

func dec6(next verdict.Protocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocol(next),
		SrcIP: net.ParseIP("fd00::1"), DstIP: net.ParseIP("fd00::2")}
}

func decRaw(b ...byte) gopacket.Payload { return gopacket.Payload(b) }

func decTCP() gopacket.SerializableLayer {
	return &layers.TCP{SrcPort: 40000, DstPort: 443, SYN: true, Options: []layers.TCPOption{
		{OptionType: layers.TCPOptionKindMSS, OptionData: []byte{5, 180}, OptionLength: 4}}}
}

func decUDP() gopacket.SerializableLayer { return &layers.UDP{SrcPort: 5000, DstPort: 53} }

func decSCTP() gopacket.SerializableLayer { return &layers.SCTP{SrcPort: 6000, DstPort: 7000} }

func decPing4() gopacket.SerializableLayer {
	return &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0), Id: 1, Seq: 1}
}

// decICMP6 is an ICMPv6 header of eight bytes.
func decICMP6(typ, code uint8) gopacket.Payload { return decRaw(typ, code, 0, 0, 0, 0, 0, 1) }

// decExt is an extension header of eight bytes with the given last six.
func decExt(next verdict.Protocol, rest ...byte) gopacket.Payload {
	return decRaw(append([]byte{byte(next), 0}, append(rest, make([]byte, 6-len(rest))...)...)...)
}

func decSet(b []byte, at int, v ...byte) []byte { copy(b[at:], v); return b }

// decFlow decodes a packet that was captured whole.
func decFlow(version uint16, b []byte) verdict.Flow {
	var f verdict.Flow
	NewDecoder().Decode(version, b, uint32(len(b)), &f)
	return f
}

// decLine writes a flow as the tables below expect it.
func decLine(f verdict.Flow) string {
	s := fmt.Sprintf("%s %s>%s", f.Proto, f.Src, f.Dst)
	switch {
	case f.Defect != verdict.ReasonNone:
		s += " " + f.Defect.String()
	case f.Proto.HasPorts():
		s += fmt.Sprintf(" %d>%d", f.SrcPort, f.DstPort)
	case f.Proto == verdict.ICMP || f.Proto == verdict.ICMPv6:
		s += fmt.Sprintf(" %d/%d", f.ICMPType, f.ICMPCode)
	}
	return s
}

const (
	decEnds4 = "10.0.0.1>10.0.0.2"
	decEnds6 = "fd00::1>fd00::2"
	decNone  = "invalid IP>invalid IP"
)

func TestDecode(t *testing.T) {
	x, pad := decRaw(1, 2, 3, 4), decRaw(make([]byte, 20)...)
	mapped := []byte{10: 255, 11: 255, 12: 10, 15: 1}
	opt4 := func(o ...byte) []byte { // IPv4 with four bytes of raw options
		b := decPacket(dec4(17), decRaw(o...), decUDP())
		b[0] = 0x46
		return b
	}
	frag := func(next verdict.Protocol, off ...byte) gopacket.Payload { return decExt(next, off...) }
	exts := func(n int) []byte {
		parts := []gopacket.SerializableLayer{dec6(60)}
		for i := range n {
			next := verdict.Protocol(60)
			if i == n-1 {
				next = verdict.TCP
			}
			parts = append(parts, decExt(next))
		}
		return decPacket(append(parts, decTCP())...)
	}
	for _, c := range []struct {
		name    string
		version uint16
		b       []byte
		want    string
	}{
		{"tcp", 4, decPacket(dec4(6), decTCP()), "TCP " + decEnds4 + " 40000>443"},
		{"tcp6", 6, decPacket(dec6(6), decTCP(), x), "TCP " + decEnds6 + " 40000>443"},
		{"udp without data", 4, decPacket(dec4(17), decUDP()), "UDP " + decEnds4 + " 5000>53"},
		{"udp6", 6, decPacket(dec6(17), decUDP(), x), "UDP " + decEnds6 + " 5000>53"},
		{"sctp", 4, decPacket(dec4(132), decSCTP()), "SCTP " + decEnds4 + " 6000>7000"},
		{"sctp6", 6, decPacket(dec6(132), decSCTP(), x), "SCTP " + decEnds6 + " 6000>7000"},
		{"ping", 4, decPacket(dec4(1), decPing4()), "ICMP " + decEnds4 + " 8/0"},
		{"ping6", 6, decPacket(dec6(58), decICMP6(128, 0)), "ICMPv6 " + decEnds6 + " 128/0"},
		{"neighbour solicitation", 6, decPacket(dec6(58), decICMP6(135, 0)), "ICMPv6 " + decEnds6 + " 135/0"},
		{"neighbour solicitation that was forwarded", 6, decSet(decPacket(dec6(58), decICMP6(135, 0)), 7, 254), "ICMPv6 " + decEnds6 + " malformed"},
		{"echo that was forwarded", 6, decSet(decPacket(dec6(58), decICMP6(128, 0)), 7, 63), "ICMPv6 " + decEnds6 + " 128/0"},
		{"icmpv6 in ipv4 has no type", 4, decPacket(dec4(58), decICMP6(135, 0)), "ICMPv6 " + decEnds4 + " 0/0"},
		{"icmp in ipv6 has no type", 6, decPacket(dec6(1), decICMP6(8, 0)), "ICMP " + decEnds6 + " 0/0"},
		{"gre", 4, decPacket(dec4(47), x), "47 " + decEnds4},
		{"esp6", 6, decPacket(dec6(50), x), "50 " + decEnds6},
		{"no next header", 6, decPacket(dec6(59)), "59 " + decEnds6},
		{"unknown protocol without a byte of payload", 4, decPacket(dec4(253)), "253 " + decEnds4},
		{"ip in ip stays outside", 4, decPacket(dec4(4), &layers.IPv4{Version: 4, Protocol: 6, SrcIP: net.IPv4(9, 9, 9, 9).To4(), DstIP: net.IPv4(8, 8, 8, 8).To4()}, decTCP()), "4 " + decEnds4},
		{"ip6 in ip6 stays outside", 6, decPacket(dec6(41), dec4(6), decTCP()), "41 " + decEnds6},
		{"ah in ipv4 is a protocol", 4, decPacket(dec4(51), decExt(6), decTCP()), "51 " + decEnds4},
		{"hop-by-hop number in ipv4 is a protocol", 4, decPacket(dec4(0), decExt(6), decTCP()), "0 " + decEnds4},

		{"options", 4, opt4(1, 1, 1, 0), "UDP " + decEnds4 + " 5000>53"},
		{"router alert", 4, opt4(148, 4, 0, 0), "UDP " + decEnds4 + " 5000>53"},
		{"option too long", 4, opt4(148, 5, 0, 0), "UDP " + decEnds4 + " malformed"},
		{"option without end", 4, opt4(1, 1, 1, 7), "UDP " + decEnds4 + " malformed"},
		{"option of length 0", 4, opt4(7, 0, 0, 0), "UDP " + decEnds4 + " malformed"},
		{"loose source route", 4, opt4(131, 3, 4, 0), "UDP " + decEnds4 + " malformed"},
		{"strict source route", 4, opt4(1, 137, 3, 4), "UDP " + decEnds4 + " malformed"},

		{"nothing", 4, nil, "0 " + decNone + " truncated"},
		{"hook says nonsense", 0, decPacket(dec4(6), decTCP()), "0 " + decNone + " malformed"},
		{"ipv6 through an ipv4 hook", 4, decPacket(dec6(6), decTCP()), "0 " + decNone + " malformed"},
		{"ipv4 through an ipv6 hook", 6, decPacket(dec4(6), decTCP(), pad), "0 " + decNone + " malformed"},
		{"half an ipv4 header", 4, decPacket(dec4(6))[:19], "0 " + decNone + " truncated"},
		{"half an ipv6 header", 6, decPacket(dec6(6))[:39], "0 " + decNone + " truncated"},
		{"IHL 4", 4, decSet(decPacket(dec4(6), decTCP()), 0, 0x44), "TCP " + decEnds4 + " malformed"},
		{"IHL beyond the total length", 4, decSet(decPacket(dec4(17), decUDP()), 0, 0x4f), "UDP " + decEnds4 + " malformed"},
		{"total length below the header's", 4, decSet(decPacket(dec4(6), decTCP()), 2, 0, 19), "TCP " + decEnds4 + " malformed"},
		{"total length zero", 4, decSet(decPacket(dec4(6), decTCP()), 2, 0, 0), "TCP " + decEnds4 + " malformed"},
		{"total length beyond the packet", 4, decSet(decPacket(dec4(6), decTCP()), 2, 1, 0), "TCP " + decEnds4 + " malformed"},
		{"padding after the packet", 4, append(decPacket(dec4(17), decUDP()), 1, 2, 3), "UDP " + decEnds4 + " 5000>53"},
		{"ports only in the padding", 4, decSet(decPacket(dec4(17), decUDP()), 2, 0, 20), "UDP " + decEnds4 + " truncated"},
		{"payload length beyond the packet", 6, decSet(decPacket(dec6(6), decTCP()), 4, 1, 0), "TCP " + decEnds6 + " malformed"},
		{"payload length zero", 6, decSet(decPacket(dec6(6), decTCP()), 4, 0, 0), "TCP " + decEnds6 + " truncated"},
		{"first fragment", 4, decSet(decPacket(dec4(6), decTCP()), 6, 0x20, 0), "TCP " + decEnds4 + " fragment"},
		{"later fragment", 4, decSet(decPacket(dec4(6), decTCP()), 6, 0, 1), "TCP " + decEnds4 + " fragment"},
		{"don't fragment", 4, decSet(decPacket(dec4(6), decTCP()), 6, 0x40, 0), "TCP " + decEnds4 + " 40000>443"},
		{"tiny fragment", 4, decSet(decPacket(dec4(6), x), 6, 0x20, 0), "TCP " + decEnds4 + " fragment"},

		{"tcp offset 4", 4, decSet(decPacket(dec4(6), decTCP()), 32, 0x40), "TCP " + decEnds4 + " malformed"},
		{"tcp offset beyond the packet", 4, decSet(decPacket(dec4(6), decTCP()), 32, 0x70), "TCP " + decEnds4 + " malformed"},
		{"tcp option that makes no sense", 4, decSet(decPacket(dec4(6), decTCP()), 40, 2, 0), "TCP " + decEnds4 + " 40000>443"},
		{"tcp of 19 bytes", 4, decPacket(dec4(6), decRaw(make([]byte, 19)...)), "TCP " + decEnds4 + " truncated"},
		{"udp length 7", 4, decSet(decPacket(dec4(17), decUDP()), 24, 0, 7), "UDP " + decEnds4 + " malformed"},
		{"udp length 0", 6, decSet(decPacket(dec6(17), decUDP()), 44, 0, 0), "UDP " + decEnds6 + " malformed"},
		{"udp length beyond the packet", 4, decSet(decPacket(dec4(17), decUDP(), x), 24, 0, 13), "UDP " + decEnds4 + " malformed"},
		{"udp length below the payload", 4, decSet(decPacket(dec4(17), decUDP(), x), 24, 0, 8), "UDP " + decEnds4 + " 5000>53"},
		{"udp of 7 bytes", 6, decPacket(dec6(17), decRaw(make([]byte, 7)...)), "UDP " + decEnds6 + " truncated"},
		{"sctp of 11 bytes", 4, decPacket(dec4(132), decRaw(make([]byte, 11)...)), "SCTP " + decEnds4 + " truncated"},
		{"icmp of 7 bytes", 4, decPacket(dec4(1), decRaw(make([]byte, 7)...)), "ICMP " + decEnds4 + " truncated"},
		{"icmpv6 of 7 bytes", 6, decPacket(dec6(58), decRaw(make([]byte, 7)...)), "ICMPv6 " + decEnds6 + " truncated"},
		{"tcp without a byte", 4, decPacket(dec4(6)), "TCP " + decEnds4 + " truncated"},

		{"4-in-6 source", 6, decSet(decPacket(dec6(6), decTCP()), 8, mapped...), "TCP ::ffff:10.0.0.1>fd00::2 malformed"},
		{"4-in-6 destination", 6, decSet(decPacket(dec6(6), decTCP()), 24, mapped...), "TCP fd00::1>::ffff:10.0.0.1 malformed"},

		{"hop-by-hop, destination, routing, ah", 6, decPacket(dec6(0), decExt(60), decExt(43), decExt(51), decRaw(6, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2), decTCP()), "TCP " + decEnds6 + " 40000>443"},
		{"hop-by-hop of 16 bytes", 6, decPacket(dec6(0), decRaw(append([]byte{17, 1}, make([]byte, 14)...)...), decUDP()), "UDP " + decEnds6 + " 5000>53"},
		{"hop-by-hop that isn't first", 6, decPacket(dec6(60), decExt(0), decExt(6), decTCP()), "0 " + decEnds6 + " malformed"},
		{"routing with a segment left", 6, decPacket(dec6(43), decExt(6, 0, 1), decTCP()), "43 " + decEnds6 + " malformed"},
		{"extension beyond the packet", 6, decPacket(dec6(60), decRaw(6, 9, 0, 0, 0, 0, 0, 0), decTCP()), "60 " + decEnds6 + " truncated"},
		{"half an extension", 6, decPacket(dec6(60), x), "60 " + decEnds6 + " truncated"},
		{"extension announced, none there", 6, decPacket(dec6(44)), "44 " + decEnds6 + " truncated"},
		{"extension, then nothing", 6, decPacket(dec6(60), decExt(6)), "TCP " + decEnds6 + " truncated"},
		{"extension, then no next header", 6, decPacket(dec6(60), decExt(59)), "59 " + decEnds6},
		{"extension, ports only in the padding", 6, decSet(decPacket(dec6(60), decExt(17), decUDP()), 4, 0, 8), "UDP " + decEnds6 + " truncated"},
		{"eight extensions", 6, exts(8), "TCP " + decEnds6 + " 40000>443"},
		{"nine extensions", 6, exts(9), "60 " + decEnds6 + " malformed"},
		{"atomic fragment", 6, decPacket(dec6(44), frag(6, 0, 0), decTCP()), "TCP " + decEnds6 + " 40000>443"},
		{"atomic fragment, reserved bits set", 6, decPacket(dec6(44), decRaw(6, 255, 0, 6, 0, 0, 0, 1), decTCP()), "TCP " + decEnds6 + " 40000>443"},
		{"first fragment, ipv6", 6, decPacket(dec6(44), frag(6, 0, 1), decTCP()), "TCP " + decEnds6 + " fragment"},
		{"later fragment, ipv6", 6, decPacket(dec6(44), frag(6, 0, 8), decTCP()), "TCP " + decEnds6 + " fragment"},
		{"fragment of an extension", 6, decPacket(dec6(44), frag(60, 0, 1), decExt(6), decTCP()), "60 " + decEnds6 + " fragment"},
		{"fragment inside a fragment", 6, decPacket(dec6(44), frag(44, 0, 0), frag(6, 0, 1), decTCP()), "TCP " + decEnds6 + " fragment"},
		{"jumbo option of a small packet", 6, decSet(decPacket(dec6(0), decExt(6, 0xc2, 4, 0, 0, 0, 20), decTCP()), 4, 0, 0), "0 " + decEnds6 + " truncated"},
		{"jumbo option beyond the packet", 6, decSet(decPacket(dec6(0), decExt(6, 0xc2, 4, 0xff, 0, 0, 20), decTCP()), 4, 0, 0), "0 " + decEnds6 + " malformed"},
	} {
		if got := decLine(decFlow(c.version, c.b)); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

// Only the beginning of a packet is captured; what it declares is judged by its
// length on the wire.
func TestDecodeBeyondCapture(t *testing.T) {
	big4 := decSet(decPacket(dec4(6), decTCP()), 2, 0, 0)
	big6 := decSet(decPacket(dec6(6), decTCP()), 4, 0, 0)
	jumbo := decSet(decPacket(dec6(0), decExt(6, 0xc2, 4, 0, 2, 0, 0), decTCP()), 4, 0, 0)
	long := decSet(decPacket(dec4(17), decUDP()), 2, 5, 0xdc, 0)
	long = decSet(long, 24, 5, 0xc8)
	ext := decPacket(dec6(60), decRaw(append([]byte{6, 127}, make([]byte, 1022)...)...), decTCP())
	for _, c := range []struct {
		name    string
		version uint16
		b       []byte
		wire    uint32
		want    string
	}{
		{"1500 bytes, 28 captured", 4, long, 1500, "UDP " + decEnds4 + " 5000>53"},
		{"1499 bytes of 1500", 4, long, 1499, "UDP " + decEnds4 + " malformed"},
		{"cut inside the ports", 4, long[:24], 1500, "UDP " + decEnds4 + " truncated"},
		{"cut inside the addresses", 4, long[:18], 1500, "0 " + decNone + " truncated"},
		{"segment too long for the field", 4, big4, 70000, "TCP " + decEnds4 + " 40000>443"},
		{"segment too long for the field, ipv6", 6, big6, 70000, "TCP " + decEnds6 + " 40000>443"},
		{"jumbogram", 6, jumbo, 40 + 0x20000, "TCP " + decEnds6 + " 40000>443"},
		{"jumbogram that is cut", 6, jumbo, 0x20000, "0 " + decEnds6 + " malformed"},
		{"chain past the copy range", 6, ext[:512], uint32(len(ext)), "60 " + decEnds6 + " truncated"},
		{"the same chain in a wider range", 6, ext, uint32(len(ext)), "TCP " + decEnds6 + " 40000>443"},
	} {
		var f verdict.Flow
		NewDecoder().Decode(c.version, c.b, c.wire, &f)
		if got := decLine(f); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}

// decSamples are whole packets of every shape that decodes without a defect.
func decSamples() map[string][]byte {
	x := decRaw(1, 2, 3, 4, 5)
	return map[string][]byte{
		"4 tcp":  decPacket(dec4(6), decTCP(), x),
		"4 udp":  decPacket(dec4(17), decUDP(), x),
		"4 sctp": decPacket(dec4(132), decSCTP(), x),
		"4 ping": decPacket(dec4(1), decPing4(), x),
		"4 gre":  decPacket(dec4(47), x),
		"6 tcp":  decPacket(dec6(6), decTCP(), x),
		"6 udp":  decPacket(dec6(17), decUDP(), x),
		"6 sctp": decPacket(dec6(132), decSCTP(), x),
		"6 ping": decPacket(dec6(58), decICMP6(128, 0), x),
		"6 exts": decPacket(dec6(0), decExt(60), decExt(43), decExt(44), decExt(6), decTCP(), x),
		"6 ah":   decPacket(dec6(51), decRaw(17, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2), decUDP(), x),
	}
}

// A packet that is cut anywhere is a defect or still the same flow, never
// another one; the addresses are there as soon as the fixed header is.
func TestDecodeEveryTruncation(t *testing.T) {
	d := NewDecoder()
	for name, b := range decSamples() {
		version, head := uint16(name[0]-'0'), 20
		if version == 6 {
			head = 40
		}
		whole := decFlow(version, b)
		if whole.Defect != verdict.ReasonNone {
			t.Fatalf("%s: %s", name, whole.Defect)
		}
		for n := range b {
			for _, wire := range []int{n, len(b)} {
				var f verdict.Flow
				d.Decode(version, b[:n], uint32(wire), &f)
				if (n >= head) != f.Src.IsValid() || (n >= head) != f.Dst.IsValid() {
					t.Errorf("%s cut to %d of %d: addresses %s>%s", name, n, wire, f.Src, f.Dst)
				}
				if f.Defect == verdict.ReasonNone && (f != whole || wire == n) {
					t.Errorf("%s cut to %d of %d: %+v, whole %+v", name, n, wire, f, whole)
				}
				if f.Defect != verdict.ReasonNone && (f.SrcPort|f.DstPort != 0 || f.ICMPType != 0) {
					t.Errorf("%s cut to %d of %d: a defect with ports: %+v", name, n, wire, f)
				}
			}
		}
	}
}

// What one packet left in the decoder must not show in the next one.
func TestDecoderForgets(t *testing.T) {
	d := NewDecoder()
	samples := decSamples()
	for first, a := range samples {
		for second, b := range samples {
			var f verdict.Flow
			d.Decode(uint16(first[0]-'0'), a, uint32(len(a)), &f)
			d.Decode(uint16(second[0]-'0'), b, uint32(len(b)), &f)
			if want := decFlow(uint16(second[0]-'0'), b); f != want {
				t.Errorf("%s after %s: %+v, want %+v", second, first, f, want)
			}
		}
	}
}

func TestDecodeNoAllocs(t *testing.T) {
	d := NewDecoder()
	var f verdict.Flow
	samples := decSamples()
	samples["4 udp length 7"] = decSet(decPacket(dec4(17), decUDP()), 24, 0, 7)
	samples["4 tcp offset 4"] = decSet(decPacket(dec4(6), decTCP()), 32, 0x40)
	samples["4 cut"] = decPacket(dec4(6), decTCP())[:30]
	samples["6 fragment"] = decPacket(dec6(44), decExt(6, 0, 1), decTCP())
	samples["6 many options"] = decPacket(dec6(6), &layers.TCP{SYN: true, Options: slices.Repeat([]layers.TCPOption{{OptionType: 1}}, 40)})
	for name, b := range samples {
		version := uint16(name[0] - '0')
		if n := testing.AllocsPerRun(100, func() { d.Decode(version, b, uint32(len(b)), &f) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, name := range []string{"4 tcp", "4 udp", "4 ping", "6 tcp", "6 exts"} {
		b.Run(name, func(b *testing.B) {
			d, p := NewDecoder(), decSamples()[name]
			var f verdict.Flow
			b.ReportAllocs()
			for b.Loop() {
				d.Decode(uint16(name[0]-'0'), p, uint32(len(p)), &f)
			}
			if f.Defect != verdict.ReasonNone {
				b.Fatal(f.Defect)
			}
		})
	}
}
