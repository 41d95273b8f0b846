package filter

import (
	"encoding/binary"
	"math"
	"net/netip"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"portcullis/verdict"
)

const (
	ipv4Header = 20
	ipv6Header = 40
	// maxPayload is the most that a 16-bit length field can declare.
	maxPayload = 65535
	// maxExtHeaders is how many extension headers are followed. RFC 8200 has a
	// sender use six kinds once and destination options twice; a chain beyond
	// that only serves to hide the transport header.
	maxExtHeaders = 8
)

// The IPv6 extension headers that Linux's ipv6_ext_hdr knows, and so what can
// stand between the fixed header and the protocol that conntrack goes by.
const (
	extHopByHop    = 0
	extRouting     = 43
	extFragment    = 44
	extAuth        = 51
	extDestination = 60
)

// layer is what the IP layers have in common: where they are in the packet.
type layer struct {
	walk    *walk
	next    gopacket.LayerType
	payload []byte
}

// NextLayerType gives the layer that follows, zero at the end.
func (l *layer) NextLayerType() gopacket.LayerType { return l.next }

// LayerPayload gives the captured bytes after this header.
func (l *layer) LayerPayload() []byte { return l.payload }

// follow goes on to what the next header field names.
func (l *layer) follow(proto uint8, payload []byte) (err error) {
	l.walk.flow.Proto = verdict.Protocol(proto)
	l.payload = payload
	if l.walk.v6 && isExtension(proto) {
		l.next = layers.LayerTypeIPv6Destination
		if len(payload) == 0 {
			// The parser stops in front of an empty payload and would take
			// the packet for whole.
			return l.refuse(verdict.ReasonTruncated)
		}
		return nil
	}
	l.next, err = l.walk.enter(payload)
	return err
}

// refuse notes why the packet isn't understood and stops the parser.
func (l *layer) refuse(r verdict.Reason) (err error) {
	l.next, err = l.walk.refuse(r)
	return err
}

func isExtension(proto uint8) bool {
	switch proto {
	case extHopByHop, extRouting, extFragment, extAuth, extDestination:
		return true
	}
	return false
}

// ipv4Layer reads an IPv4 header (RFC 791).
type ipv4Layer struct{ layer }

// CanDecode says that this is the IPv4 layer.
func (l *ipv4Layer) CanDecode() gopacket.LayerClass { return layers.LayerTypeIPv4 }

// DecodeFromBytes reads the header.
func (l *ipv4Layer) DecodeFromBytes(b []byte, _ gopacket.DecodeFeedback) error {
	if b[0]>>4 != 4 {
		return l.refuse(verdict.ReasonMalformed)
	}
	if len(b) < ipv4Header {
		return l.refuse(verdict.ReasonTruncated)
	}
	w := l.walk
	w.flow.Src = netip.AddrFrom4([4]byte(b[12:16]))
	w.flow.Dst = netip.AddrFrom4([4]byte(b[16:20]))
	w.flow.Proto = verdict.Protocol(b[9])
	head, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:4]))
	if total == 0 && w.wire > maxPayload {
		// An offloaded TCP segment too long for the field (Linux's BIG TCP,
		// iph_totlen): the buffer's length is the packet's.
		total = w.wire
	}
	if head < ipv4Header || total < head || total > w.wire {
		return l.refuse(verdict.ReasonMalformed)
	}
	// More-fragments or an offset: not the whole datagram. Conntrack puts
	// fragments together before they get here, so one that arrives is odd.
	if binary.BigEndian.Uint16(b[6:8])&0x3fff != 0 {
		return l.refuse(verdict.ReasonFragment)
	}
	if len(b) < head {
		return l.refuse(verdict.ReasonTruncated)
	}
	if !plainOptions(b[ipv4Header:head]) {
		return l.refuse(verdict.ReasonMalformed)
	}
	w.rest = total - head
	return l.follow(b[9], b[head:min(len(b), total)])
}

// plainOptions tells whether IPv4 options are well formed and none of them is a
// source route. A packet with a source route (RFC 791: loose 131, strict 137)
// names hosts to go on to in its options: the destination that policy would
// judge isn't the one that it is for.
func plainOptions(o []byte) bool {
	for len(o) > 0 {
		switch o[0] {
		case 0: // end of options
			return true
		case 1: // no operation
			o = o[1:]
			continue
		case 131, 137:
			return false
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return false
		}
		o = o[o[1]:]
	}
	return true
}

// ipv6Layer reads the fixed IPv6 header (RFC 8200).
type ipv6Layer struct{ layer }

// CanDecode says that this is the IPv6 layer.
func (l *ipv6Layer) CanDecode() gopacket.LayerClass { return layers.LayerTypeIPv6 }

// DecodeFromBytes reads the header.
func (l *ipv6Layer) DecodeFromBytes(b []byte, _ gopacket.DecodeFeedback) error {
	if b[0]>>4 != 6 {
		return l.refuse(verdict.ReasonMalformed)
	}
	if len(b) < ipv6Header {
		return l.refuse(verdict.ReasonTruncated)
	}
	w := l.walk
	w.flow.Src = netip.AddrFrom16([16]byte(b[8:24]))
	w.flow.Dst = netip.AddrFrom16([16]byte(b[24:40]))
	w.flow.Proto = verdict.Protocol(b[6])
	if w.flow.Src.Is4In6() || w.flow.Dst.Is4In6() {
		// 4-in-6 addresses are for programs, and never on a wire: judged as
		// the IPv4 addresses inside, they would be a way to take a pod's.
		return l.refuse(verdict.ReasonMalformed)
	}
	w.hopLimit = b[7]
	w.rest = int(binary.BigEndian.Uint16(b[4:6]))
	if w.rest == 0 {
		w.rest = w.jumboPayload(b)
	}
	if w.rest > w.wire-ipv6Header {
		return l.refuse(verdict.ReasonMalformed)
	}
	return l.follow(b[6], b[ipv6Header:min(len(b), ipv6Header+w.rest)])
}

// jumboPayload gives the payload length of an IPv6 packet whose length field is
// zero: what a jumbo option says where RFC 2675 (and Linux, for BIG TCP) puts
// it, first in the hop-by-hop header; all there is if an offloaded segment has
// outgrown the field without one; otherwise nothing.
func (w *walk) jumboPayload(b []byte) int {
	jumbo := b[ipv6Header:]
	if b[6] == extHopByHop && len(jumbo) >= 8 && jumbo[2] == 0xc2 && jumbo[3] == 4 {
		if n := binary.BigEndian.Uint32(jumbo[4:8]); n > maxPayload {
			return int(min(n, math.MaxInt32))
		}
		return 0
	}
	if w.wire > ipv6Header+maxPayload {
		return w.wire - ipv6Header
	}
	return 0
}

// extLayer reads one IPv6 extension header, whichever the header before it
// named; that name is in the flow's protocol.
type extLayer struct{ layer }

// CanDecode gives the one layer type that stands for all extension headers
// within the parser.
func (l *extLayer) CanDecode() gopacket.LayerClass { return layers.LayerTypeIPv6Destination }

// DecodeFromBytes reads the header. Lengths: eight bytes and a count of further
// eights (RFC 8200), but fours and two less for authentication (RFC 4302), and
// always eight bytes for a fragment header.
func (l *extLayer) DecodeFromBytes(b []byte, _ gopacket.DecodeFeedback) error {
	w := l.walk
	w.exts++
	kind := uint8(w.flow.Proto)
	// Hop-by-hop options come first or not at all (RFC 8200, section 4.1).
	if w.exts > maxExtHeaders || kind == extHopByHop && w.exts > 1 {
		return l.refuse(verdict.ReasonMalformed)
	}
	if len(b) < 8 || w.rest < 8 {
		return l.refuse(verdict.ReasonTruncated)
	}
	size := 8 + int(b[1])*8
	switch kind {
	case extFragment:
		// An offset or more-fragments: ports can't be known or trusted. With
		// neither it is an atomic fragment (RFC 6946), a whole packet.
		if binary.BigEndian.Uint16(b[2:4])&0xfff9 != 0 {
			w.flow.Proto = verdict.Protocol(b[0])
			return l.refuse(verdict.ReasonFragment)
		}
		size = 8
	case extAuth:
		size = (int(b[1]) + 2) * 4
	case extRouting:
		// Segments left: the packet is bound for somewhere else than the
		// destination that policy would judge.
		if b[3] != 0 {
			return l.refuse(verdict.ReasonMalformed)
		}
	}
	if size > w.rest || size > len(b) {
		return l.refuse(verdict.ReasonTruncated)
	}
	w.rest -= size
	return l.follow(b[0], b[size:])
}
