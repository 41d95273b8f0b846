package filter

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"portcullis/verdict"
)

// Conntrack's entries as its netlink family (ctnetlink) tells them, parsed in place
// in reused memory: a table has hundreds of thousands, and what a library makes of
// them all at once is garbage that the packet path would have to wait for. Numbers
// are those of include/uapi/linux/netfilter/nfnetlink_conntrack.h.
const (
	ctaIP        = 1 // of a tuple
	ctaProto     = 2
	ctaIPv4Src   = 1
	ctaIPv4Dst   = 2
	ctaIPv6Src   = 3
	ctaIPv6Dst   = 4
	ctaProtoNum  = 1
	ctaSrcPort   = 2
	ctaDstPort   = 3
	ctaICMPType  = 5
	ctaICMPCode  = 6
	ctaICMP6Type = 8
	ctaICMP6Code = 9

	ctaTupleReply    = 2
	ctaProtoInfo     = 4
	ctaTupleMaster   = 14
	ctaFilter        = 25
	ctaInfoTCP       = 1
	ctaInfoTCPState  = 1
	ctaInfoTCPFlags  = 4 // of the original direction
	tcpTimeWait      = 7
	tcpClose         = 8
	tcpLiberal       = 0x08
	ctaFilterOrig    = 1
	ctaFilterReply   = 2
	ctaFilterIPSrc   = 1 // a bit
	ctMaxMessage     = 64 << 10
	ctBatch          = 64 // messages that go to the kernel at once
	ctAnswerWait     = 5  // seconds
	ctMessageRoom    = 512
	ctDumpReadBuffer = 1 << 20
)

// ctTuple is one direction of a connection, as that direction's packets have it.
type ctTuple struct {
	src, dst           netip.Addr
	proto              verdict.Protocol
	srcPort, dstPort   uint16
	icmpType, icmpCode uint8
}

// ctEntry is what re-judging looks at in an entry of conntrack's table.
type ctEntry struct {
	family      byte
	orig, reply ctTuple
	master      ctTuple // of the connection that this one was expected by, or zero
	mark        uint32
	// midstream says that conntrack met the connection in its middle: it then
	// tolerates any sequence number (tcp_new in nf_conntrack_proto_tcp.c), and
	// which end has opened it isn't known.
	midstream bool
	// over says that both ends of a TCP connection have closed it, or one has
	// reset it, as far as conntrack could see.
	over bool
	// tuple and zone are the kernel's own bytes for orig and for the zone, which
	// is nil for the default one. They are part of the buffer that was parsed.
	tuple, zone []byte
	masterTuple []byte
}

// flow gives the connection as the queue saw its first packet: after DNAT, so that
// the destination is who answers, and before SNAT.
func (e *ctEntry) flow() verdict.Flow {
	f := verdict.Flow{Src: e.orig.src, Dst: e.reply.src, Proto: e.orig.proto, ICMPType: e.orig.icmpType, ICMPCode: e.orig.icmpCode}
	if f.Proto.HasPorts() {
		f.SrcPort, f.DstPort = e.orig.srcPort, e.reply.srcPort
	}
	return f
}

// nextAttr takes the first netlink attribute off b.
func nextAttr(b []byte) (kind uint16, v, rest []byte, err error) {
	if len(b) < nlAttrLen {
		return 0, nil, nil, errShort
	}
	n := int(binary.NativeEndian.Uint16(b[0:2]))
	if n < nlAttrLen || n > len(b) {
		return 0, nil, nil, errShort
	}
	return binary.NativeEndian.Uint16(b[2:4]) & attrMask, b[nlAttrLen:n], b[min(nlAlign(n), len(b)):], nil
}

// parseEntry reads the body of a message about a connection. It allocates nothing.
func parseEntry(body []byte, e *ctEntry) error {
	*e = ctEntry{}
	if len(body) < nfGenLen {
		return errShort
	}
	e.family = body[0]
	for b := body[nfGenLen:]; len(b) > 0; {
		kind, v, rest, err := nextAttr(b)
		if err == nil {
			err = e.attribute(kind, v)
		}
		if err != nil {
			return err
		}
		b = rest
	}
	if !e.orig.src.IsValid() || !e.reply.src.IsValid() {
		return errors.New("conntrack entry without its addresses")
	}
	return nil
}

// attribute takes in one attribute of an entry; those that don't matter are passed over.
func (e *ctEntry) attribute(kind uint16, v []byte) error {
	switch kind {
	case ctaTupleOrig:
		e.tuple = v
		return e.orig.parse(v)
	case ctaTupleReply:
		return e.reply.parse(v)
	case ctaTupleMaster:
		e.masterTuple = v
		return e.master.parse(v)
	case ctaZone:
		e.zone = v
	case ctaMark:
		if len(v) < 4 {
			return errShort
		}
		e.mark = binary.BigEndian.Uint32(v)
	case ctaProtoInfo:
		return e.protocolInfo(v)
	}
	return nil
}

// protocolInfo reads what TCP knows of the connection.
func (e *ctEntry) protocolInfo(b []byte) error {
	for len(b) > 0 {
		kind, v, rest, err := nextAttr(b)
		if err != nil {
			return err
		}
		for kind == ctaInfoTCP && len(v) > 0 {
			inner, value, more, err := nextAttr(v)
			if err != nil {
				return err
			}
			switch {
			case inner == ctaInfoTCPState && len(value) > 0:
				e.over = value[0] == tcpTimeWait || value[0] == tcpClose
			case inner == ctaInfoTCPFlags && len(value) > 0:
				e.midstream = value[0]&tcpLiberal != 0
			}
			v = more
		}
		b = rest
	}
	return nil
}

// parse reads the nested attributes of a tuple.
func (t *ctTuple) parse(b []byte) error {
	for len(b) > 0 {
		kind, v, rest, err := nextAttr(b)
		if err != nil {
			return err
		}
		for kind <= ctaProto && len(v) > 0 {
			inner, value, more, err := nextAttr(v)
			if err != nil {
				return err
			}
			if kind == ctaIP {
				t.address(inner, value)
			} else {
				t.protocol(inner, value)
			}
			v = more
		}
		b = rest
	}
	return nil
}

func (t *ctTuple) address(kind uint16, v []byte) {
	a, ok := netip.AddrFromSlice(v)
	if !ok {
		return // which leaves the tuple without an address
	}
	switch kind {
	case ctaIPv4Src, ctaIPv6Src:
		t.src = a.Unmap()
	case ctaIPv4Dst, ctaIPv6Dst:
		t.dst = a.Unmap()
	}
}

func (t *ctTuple) protocol(kind uint16, v []byte) {
	var number uint16
	switch len(v) {
	case 1:
		number = uint16(v[0])
	case 2:
		number = binary.BigEndian.Uint16(v)
	default:
		return
	}
	switch kind {
	case ctaProtoNum:
		t.proto = verdict.Protocol(number)
	case ctaSrcPort:
		t.srcPort = number
	case ctaDstPort:
		t.dstPort = number
	case ctaICMPType, ctaICMP6Type:
		t.icmpType = uint8(number)
	case ctaICMPCode, ctaICMP6Code:
		t.icmpCode = uint8(number)
	}
}

// Messages to the kernel.

// appendAttr appends an attribute.
func appendAttr(b []byte, kind uint16, v []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(nlAttrLen+len(v)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, v...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// beginMessage appends the headers of a conntrack message; endMessage fills in its length.
func beginMessage(b []byte, kind, flags uint16, seq uint32, family byte) []byte {
	b = append(b, 0, 0, 0, 0)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0) // the kernel knows whose socket it is
	return append(b, family, unix.NFNETLINK_V0, 0, 0)
}

func endMessage(b []byte, from int) { binary.NativeEndian.PutUint32(b[from:], uint32(len(b)-from)) }

// appendMark appends a message that changes some bits of a connection's mark,
// which is found by the kernel's own bytes of its tuple.
func appendMark(b []byte, seq uint32, e *markEdit) []byte {
	from := len(b)
	b = beginMessage(b, ctMsgNew, unix.NLM_F_ACK, seq, e.family)
	b = appendAttr(b, unix.NLA_F_NESTED|ctaTupleOrig, e.tuple)
	if e.zone != nil {
		b = appendAttr(b, ctaZone, e.zone)
	}
	b = appendAttr(b, ctaMark, bigEndian32(e.bits))
	b = appendAttr(b, ctaMarkMask, bigEndian32(e.mask))
	endMessage(b, from)
	return b
}

// ctPick says which entries a dump is to give: those of a family (or of all, for
// AF_UNSPEC), and of IPv4 maybe only those whose first end, or whose answering one,
// has an address.
//
// The kernel picks by address since Linux 5.8; an older one gives the whole family.
// By IPv6 address it picks just those that haven't the address
// (ctnetlink_filter_match_tuple, as of Linux 6.18), so it isn't asked to.
type ctPick struct {
	family byte
	addr   netip.Addr // IPv4, or the zero Addr for any
	reply  bool       // it is the answering end's
}

// appendDump appends a request for entries.
func appendDump(b []byte, seq uint32, pick ctPick) []byte {
	from := len(b)
	b = beginMessage(b, ctMsgGet, unix.NLM_F_DUMP, seq, pick.family)
	if pick.addr.Is4() {
		tuple, flags := uint16(ctaTupleOrig), uint16(ctaFilterOrig)
		if pick.reply {
			tuple, flags = ctaTupleReply, ctaFilterReply
		}
		ip := appendAttr(nil, unix.NLA_F_NESTED|ctaIP, appendAttr(nil, ctaIPv4Src, pick.addr.AsSlice()))
		b = appendAttr(b, unix.NLA_F_NESTED|tuple, ip)
		b = appendAttr(b, unix.NLA_F_NESTED|ctaFilter, appendAttr(nil, flags, binary.NativeEndian.AppendUint32(nil, ctaFilterIPSrc)))
	}
	endMessage(b, from)
	return b
}

// appendGet appends a request for the entry of a tuple.
func appendGet(b []byte, seq uint32, e *ctEntry) []byte {
	from := len(b)
	b = beginMessage(b, ctMsgGet, unix.NLM_F_ACK, seq, e.family)
	b = appendAttr(b, unix.NLA_F_NESTED|ctaTupleOrig, e.masterTuple)
	if e.zone != nil {
		b = appendAttr(b, ctaZone, e.zone)
	}
	endMessage(b, from)
	return b
}
