package filter

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"portcullis/verdict"
)

// decOracle reads a packet slowly with plain gopacket, every layer on the heap.
// It answers only where gopacket found a transport header right behind the IP
// header and its extensions.
func decOracle(version uint16, b []byte) (f verdict.Flow, ok bool) {
	first := layers.LayerTypeIPv4
	if version == 6 {
		first = layers.LayerTypeIPv6
	}
	p := gopacket.NewPacket(b, first, gopacket.Default)
	all := p.Layers()
	if len(all) < 2 {
		return f, false
	}
	switch ip := all[0].(type) {
	case *layers.IPv4:
		f.Src, f.Dst = decAddr(ip.SrcIP), decAddr(ip.DstIP)
	case *layers.IPv6:
		f.Src, f.Dst = decAddr(ip.SrcIP), decAddr(ip.DstIP)
	default:
		return f, false
	}
	at := 1
	for version == 6 && at < len(all) && layers.LayerClassIPv6Extension.Contains(all[at].LayerType()) {
		at++
	}
	if at == len(all) {
		return f, false
	}
	switch l := all[at].(type) {
	case *layers.TCP:
		f.Proto, f.SrcPort, f.DstPort = verdict.TCP, uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.UDP:
		f.Proto, f.SrcPort, f.DstPort = verdict.UDP, uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.SCTP:
		f.Proto, f.SrcPort, f.DstPort = verdict.SCTP, uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.ICMPv4:
		f.Proto, f.ICMPType, f.ICMPCode = verdict.ICMP, l.TypeCode.Type(), l.TypeCode.Code()
	case *layers.ICMPv6:
		f.Proto, f.ICMPType, f.ICMPCode = verdict.ICMPv6, l.TypeCode.Type(), l.TypeCode.Code()
	default:
		return f, false
	}
	return f, true
}

func decAddr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// decComparable leaves out what gopacket is known to read otherwise than Linux
// does: a hop-by-hop header, of which its IPv6 layer miscounts the length, and
// ICMP inside the other IP version, which it takes for ICMP.
func decComparable(version uint16, b []byte, f verdict.Flow) bool {
	return f.Defect == verdict.ReasonNone &&
		!(version == 6 && b[6] == extHopByHop) &&
		!(version == 4 && f.Proto == verdict.ICMPv6) && !(version == 6 && f.Proto == verdict.ICMP)
}

// Random damage to good packets: where both this decoder and gopacket find a
// transport header, they find the same.
func TestDecodeAgainstOracle(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	samples := decSamples()
	d, compared, refused := NewDecoder(), 0, 0
	for range 3000 {
		for name, good := range samples {
			b := append([]byte(nil), good...)
			for range r.IntN(4) {
				b[r.IntN(len(b))] = byte(r.Uint32())
			}
			version := uint16(name[0] - '0')
			var f verdict.Flow
			d.Decode(version, b, uint32(len(b)), &f)
			want, ok := decOracle(version, b)
			if f.Defect != verdict.ReasonNone {
				refused++
			}
			if !ok || !decComparable(version, b, f) {
				continue
			}
			if compared++; f != want {
				t.Fatalf("%s % x:\n got %+v\nwant %+v", name, b, f, want)
			}
		}
	}
	if compared < 5000 || refused < 1000 {
		t.Errorf("the random packets prove little: %d compared, %d refused", compared, refused)
	}
}

// decRandom builds a random good packet and says what it is.
func decRandom(r *rand.Rand) (version uint16, b []byte, want verdict.Flow) {
	protos := []verdict.Protocol{verdict.TCP, verdict.UDP, verdict.SCTP, verdict.ICMP, 47, 50, 136}
	want.Proto = protos[r.IntN(len(protos))]
	want.SrcPort, want.DstPort = uint16(r.Uint32()), uint16(r.Uint32())
	version = uint16(4 + 2*r.IntN(2))
	if version == 6 && want.Proto == verdict.ICMP {
		want.Proto = verdict.ICMPv6
	}
	parts := []gopacket.SerializableLayer{dec4(want.Proto)}
	want.Src, want.Dst = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	if version == 6 {
		kinds := []verdict.Protocol{extRouting, extFragment, extDestination, extAuth}
		want.Src, want.Dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
		next, exts := want.Proto, []gopacket.SerializableLayer{}
		for range r.IntN(5) {
			kind := kinds[r.IntN(len(kinds))]
			exts = append([]gopacket.SerializableLayer{decExt(next)}, exts...)
			next = kind
		}
		parts = append([]gopacket.SerializableLayer{dec6(next)}, exts...)
	}
	switch want.Proto {
	case verdict.TCP:
		parts = append(parts, &layers.TCP{SrcPort: layers.TCPPort(want.SrcPort), DstPort: layers.TCPPort(want.DstPort)})
	case verdict.UDP:
		parts = append(parts, &layers.UDP{SrcPort: layers.UDPPort(want.SrcPort), DstPort: layers.UDPPort(want.DstPort)})
	case verdict.SCTP:
		parts = append(parts, &layers.SCTP{SrcPort: layers.SCTPPort(want.SrcPort), DstPort: layers.SCTPPort(want.DstPort)})
	default:
		want.SrcPort, want.DstPort = 0, 0
		if want.Proto == verdict.ICMP || want.Proto == verdict.ICMPv6 {
			want.ICMPType, want.ICMPCode = uint8(r.Uint32()), uint8(r.Uint32())
			parts = append(parts, decICMP6(want.ICMPType, want.ICMPCode))
		}
	}
	data := make([]byte, r.IntN(40))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return version, decPacket(append(parts, gopacket.Payload(data))...), want
}

// Good packets of every protocol behind random chains of extension headers are
// read as they were built, none of them refused.
func TestDecodeRandomGoodPackets(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	d := NewDecoder()
	for range 20000 {
		version, b, want := decRandom(r)
		var f verdict.Flow
		d.Decode(version, b, uint32(len(b)), &f)
		if f != want {
			t.Fatalf("% x:\n got %+v\nwant %+v", b, f, want)
		}
	}
}

// FuzzDecode looks for panics, for flows that change with what follows the
// packet, and for disagreement with gopacket.
func FuzzDecode(f *testing.F) {
	for name, b := range decSamples() {
		f.Add(uint16(name[0]-'0'), b, uint32(len(b)))
		f.Add(uint16(name[0]-'0'), b[:len(b)-9], uint32(len(b)))
	}
	f.Fuzz(func(t *testing.T, version uint16, b []byte, wire uint32) {
		var got, again verdict.Flow
		d := NewDecoder()
		d.Decode(version, b, wire, &got)
		d.Decode(version, append(b[:len(b):len(b)], 0xff), max(wire, uint32(len(b))), &again)
		if got.Defect != verdict.ReasonNone {
			if got.SrcPort|got.DstPort != 0 || got.ICMPType|got.ICMPCode != 0 {
				t.Fatalf("a defect with ports: %+v", got)
			}
			return
		}
		if !got.Src.IsValid() || !got.Dst.IsValid() || got.Src.Is4In6() || got.Dst.Is4In6() {
			t.Fatalf("no defect, and addresses %s>%s", got.Src, got.Dst)
		}
		if decDeclared(version, b) <= len(b) && again != got {
			t.Fatalf("a byte after the packet turns %+v into %+v", got, again)
		}
		if want, ok := decOracle(version, b); ok && decComparable(version, b, got) && got != want {
			t.Fatalf("got %+v, gopacket %+v", got, want)
		}
	})
}

// decDeclared gives the length that the IP header declares, jumbograms apart.
func decDeclared(version uint16, b []byte) int {
	if version == 4 {
		return int(binary.BigEndian.Uint16(b[2:4]))
	}
	return ipv6Header + int(binary.BigEndian.Uint16(b[4:6]))
}
