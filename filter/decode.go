package filter

import (
	"encoding/binary"
	"errors"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"portcullis/verdict"
)

// Decoder turns captured packets into flows. It is reused from packet to
// packet, allocates nothing after NewDecoder, and is for one goroutine.
//
// It drives gopacket's DecodingLayerParser. Of gopacket's layers it uses UDP,
// SCTP, ICMP and ICMPv6; it brings its own for IPv4, IPv6, the IPv6 extension
// headers and TCP, because gopacket's
//
//   - collect IP and TCP options in slices that grow on the heap, and refuse a
//     TCP header for an option that the receiver would pass over;
//   - go on into a tunnel (IP in IP) and would overwrite the outer addresses
//     with inner ones, which the sender is free to choose;
//   - take a fragment's payload, or whatever follows a cut, for a header;
//   - keep an IPv6 payload length that includes a hop-by-hop header they have
//     already left behind.
//
// The errors of gopacket's layers allocate, so each transport header's lengths
// are checked before the layer sees it.
type Decoder struct {
	walk  walk
	udp   layers.UDP
	sctp  layers.SCTP
	icmp4 layers.ICMPv4
	icmp6 layers.ICMPv6
	v4    *gopacket.DecodingLayerParser
	v6    *gopacket.DecodingLayerParser
	seen  []gopacket.LayerType
}

// walk is what the layers of one packet share while it is decoded.
type walk struct {
	flow *verdict.Flow
	v6   bool
	// wire is the length of the whole packet; rest is how much of what the IP
	// header declares is still ahead. Both may exceed what was captured.
	wire, rest int
	exts       int
	hopLimit   uint8
	tcpSrc     uint16
	tcpDst     uint16
	tcpFlags   uint8
}

// errDefect stops the parser; the reason is already in the flow. It is one
// value, so that refusing a packet costs no allocation.
var errDefect = errors.New("defective packet")

// NewDecoder gives a decoder that is ready for packets of both IP versions.
func NewDecoder() *Decoder {
	d := &Decoder{seen: make([]gopacket.LayerType, 0, maxExtHeaders+4)}
	parser := func(first gopacket.LayerType, own ...gopacket.DecodingLayer) *gopacket.DecodingLayerParser {
		p := gopacket.NewDecodingLayerParser(first)
		c := gopacket.DecodingLayerContainer(gopacket.DecodingLayerSparse(nil))
		for _, l := range append(own, &tcpLayer{walk: &d.walk}, &d.udp, &d.sctp) {
			c = c.Put(l)
		}
		p.SetDecodingLayerContainer(c)
		p.IgnoreUnsupported = true
		return p
	}
	d.v4 = parser(layers.LayerTypeIPv4, &ipv4Layer{layer{walk: &d.walk}}, &d.icmp4)
	d.v6 = parser(layers.LayerTypeIPv6, &ipv6Layer{layer{walk: &d.walk}}, &extLayer{layer{walk: &d.walk}}, &d.icmp6)
	return d
}

// Decode fills f from the captured bytes b, which begin at the IP header. The
// version (4 or 6) is what the kernel's hook says the packet is; wireLen is the
// packet's whole length in bytes, of which b may be the beginning.
//
// A packet that wasn't understood whole gets f.Defect; its addresses are filled
// in if they could be read, its ports and ICMP type never are. A protocol
// without ports that is none of ICMP and ICMPv6 gives its number and nothing
// else: what it carries is its own business. Ports and ICMP types are read as
// Linux's conntrack does (ipv6_skip_exthdr, and the l4proto checks), so that
// one connection is one thing for both.
func (d *Decoder) Decode(version uint16, b []byte, wireLen uint32, f *verdict.Flow) {
	*f = verdict.Flow{}
	d.walk = walk{flow: f, v6: version == 6, wire: max(int(wireLen), len(b))}
	parser := d.v4
	switch version {
	case 4:
	case 6:
		parser = d.v6
	default:
		f.Defect = verdict.ReasonMalformed
		return
	}
	if len(b) == 0 {
		f.Defect = verdict.ReasonTruncated
		return
	}
	d.seen = d.seen[:0]
	if err := parser.DecodeLayers(b, &d.seen); err != nil {
		if f.Defect == verdict.ReasonNone {
			// A layer of gopacket's own refused, or panicked.
			f.Defect = verdict.ReasonMalformed
		}
		return
	}
	d.fill(f)
}

// fill takes the ports or the ICMP type from the transport layer. A transport
// layer that should have been reached and wasn't is a defect, so that ports of
// an earlier packet can never be taken for this one's.
func (d *Decoder) fill(f *verdict.Flow) {
	want := transportLayer(f.Proto, d.walk.v6)
	if want == gopacket.LayerTypeZero {
		return
	}
	if len(d.seen) == 0 || d.seen[len(d.seen)-1] != want {
		f.Defect = verdict.ReasonMalformed
		return
	}
	switch f.Proto {
	case verdict.TCP:
		f.SrcPort, f.DstPort = d.walk.tcpSrc, d.walk.tcpDst
	case verdict.UDP:
		f.SrcPort, f.DstPort = uint16(d.udp.SrcPort), uint16(d.udp.DstPort)
	case verdict.SCTP:
		f.SrcPort, f.DstPort = uint16(d.sctp.SrcPort), uint16(d.sctp.DstPort)
	case verdict.ICMP:
		f.ICMPType, f.ICMPCode = d.icmp4.TypeCode.Type(), d.icmp4.TypeCode.Code()
	case verdict.ICMPv6:
		f.ICMPType, f.ICMPCode = d.icmp6.TypeCode.Type(), d.icmp6.TypeCode.Code()
	}
}

// transportLayer names the layer that reads a protocol's header; zero for a
// protocol that has nothing policy looks at. ICMP belongs to IPv4 and ICMPv6 to
// IPv6: the one inside the other's version is just a protocol number, lest a
// sender reach an exemption of the other version.
func transportLayer(p verdict.Protocol, v6 bool) gopacket.LayerType {
	switch {
	case p == verdict.TCP:
		return layers.LayerTypeTCP
	case p == verdict.UDP:
		return layers.LayerTypeUDP
	case p == verdict.SCTP:
		return layers.LayerTypeSCTP
	case p == verdict.ICMP && !v6:
		return layers.LayerTypeICMPv4
	case p == verdict.ICMPv6 && v6:
		return layers.LayerTypeICMPv6
	}
	return gopacket.LayerTypeZero
}

// Lengths in bytes of the transport headers' fixed parts. ICMPv6's is that of
// Linux's struct icmp6hdr, which conntrack asks for.
const (
	tcpHeader  = 20
	udpHeader  = 8
	sctpHeader = 12
	icmpHeader = 8
)

// enter checks the transport header at the beginning of b and says which layer
// reads it.
func (w *walk) enter(b []byte) (gopacket.LayerType, error) {
	next := transportLayer(w.flow.Proto, w.v6)
	var need int
	switch next {
	case gopacket.LayerTypeZero:
		return next, nil
	case layers.LayerTypeTCP:
		need = tcpHeader
	case layers.LayerTypeUDP:
		need = udpHeader
	case layers.LayerTypeSCTP:
		need = sctpHeader
	default:
		need = icmpHeader
	}
	if need > w.rest || need > len(b) {
		return w.refuse(verdict.ReasonTruncated)
	}
	switch next {
	case layers.LayerTypeUDP:
		// RFC 768: the length counts the header. Zero is for jumbograms only
		// (RFC 2675). More than the IP payload contradicts it; less is legal.
		n := int(binary.BigEndian.Uint16(b[4:6]))
		if n > w.rest || n < udpHeader && (n != 0 || w.rest <= maxPayload) {
			return w.refuse(verdict.ReasonMalformed)
		}
	case layers.LayerTypeICMPv6:
		// RFC 4861, section 7.1: neighbour discovery stays on its link, and
		// its receivers discard what has a hop limit below 255. These types
		// are exempt from policy, and a router's hook sees 254 at most: so
		// they are no way out for what has been forwarded.
		if b[0] >= 133 && b[0] <= 137 && w.hopLimit != 255 {
			return w.refuse(verdict.ReasonMalformed)
		}
	}
	return next, nil
}

// refuse notes why the packet isn't understood and stops the parser.
func (w *walk) refuse(r verdict.Reason) (gopacket.LayerType, error) {
	w.flow.Defect = r
	return gopacket.LayerTypeZero, errDefect
}

// tcpLayer reads a TCP header's ports. The data offset is checked as conntrack
// does (tcp_error in nf_conntrack_proto_tcp.c); options are the receiver's.
type tcpLayer struct{ walk *walk }

// DecodeFromBytes reads the header; enter has seen to it that its fixed part is
// there.
func (l *tcpLayer) DecodeFromBytes(b []byte, _ gopacket.DecodeFeedback) error {
	n := int(b[12]>>4) * 4
	if n < tcpHeader || n > l.walk.rest {
		_, err := l.walk.refuse(verdict.ReasonMalformed)
		return err
	}
	l.walk.tcpSrc = binary.BigEndian.Uint16(b[0:2])
	l.walk.tcpDst = binary.BigEndian.Uint16(b[2:4])
	l.walk.tcpFlags = b[13]
	return nil
}

// CanDecode, NextLayerType and LayerPayload complete gopacket.DecodingLayer;
// nothing that follows TCP matters.
func (l *tcpLayer) CanDecode() gopacket.LayerClass    { return layers.LayerTypeTCP }
func (l *tcpLayer) NextLayerType() gopacket.LayerType { return gopacket.LayerTypeZero }
func (l *tcpLayer) LayerPayload() []byte              { return nil }
