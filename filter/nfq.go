package filter

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// The netlink messages of NFQUEUE, parsed and built by hand in reused memory:
// include/uapi/linux/netlink.h, netfilter/nfnetlink.h and
// netfilter/nfnetlink_queue.h. Netlink's own headers are in host byte order,
// what nfnetlink_queue puts into attributes is in network byte order.

const (
	nlHeaderLen = 16 // struct nlmsghdr
	nfGenLen    = 4  // struct nfgenmsg
	nlAttrLen   = 4  // struct nlattr
	// msgOverhead is room for all that stands around the payload of a packet
	// message: headers and attributes come to less than 300 bytes.
	msgOverhead = 1024

	typePacket  = unix.NFNL_SUBSYS_QUEUE << 8   // NFQNL_MSG_PACKET, 0
	typeVerdict = unix.NFNL_SUBSYS_QUEUE<<8 | 1 // NFQNL_MSG_VERDICT
	typeConfig  = unix.NFNL_SUBSYS_QUEUE<<8 | 2 // NFQNL_MSG_CONFIG
	attrMask    = 0x3fff                        // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// Attributes of packet and verdict messages (enum nfqnl_attr_type).
const (
	attrPacketHeader  = 1
	attrVerdictHeader = 2
	attrMark          = 3
	attrInDev         = 5
	attrOutDev        = 6
	attrPhysInDev     = 7
	attrPhysOutDev    = 8
	attrPayload       = 10
	attrCapLen        = 13
)

// The kernel's verdicts (include/uapi/linux/netfilter.h).
const (
	nfDrop   = 0
	nfAccept = 1
	nfRepeat = 4
)

var (
	errShort    = errors.New("netlink message ends too early")
	errNoPacket = errors.New("packet message without a packet id")
)

// nlMessage is one netlink message of a datagram.
type nlMessage struct {
	kind uint16
	body []byte
}

// nextMessage takes the first message off a datagram. A message that claims
// more than the datagram holds is handed out as far as it is there, with
// errShort: its packet id may still be readable.
func nextMessage(b []byte) (m nlMessage, rest []byte, err error) {
	if len(b) < nlHeaderLen {
		return m, nil, errShort
	}
	n := int(binary.NativeEndian.Uint32(b[0:4]))
	m.kind = binary.NativeEndian.Uint16(b[4:6])
	switch {
	case n < nlHeaderLen:
		return m, nil, errShort
	case n > len(b):
		m.body = b[nlHeaderLen:]
		return m, nil, errShort
	}
	m.body = b[nlHeaderLen:n]
	return m, b[min(nlAlign(n), len(b)):], nil
}

func nlAlign(n int) int { return (n + 3) &^ 3 }

// queuedPacket is what a packet message says about a packet that waits for its
// verdict. The payload is part of the buffer that was parsed.
type queuedPacket struct {
	id      uint32
	hasID   bool
	queue   uint16
	hook    uint8
	version uint16 // 4 or 6, as the hook has it; 0 if it is neither
	mark    uint32
	// inDev and outDev are interface indexes; physIn and physOut are the bridge
	// ports behind them. Zero: none.
	inDev, outDev, physIn, physOut uint32
	payload                        []byte
	wireLen                        uint32 // the whole packet's, in bytes
}

// parsePacket reads the body of an NFQNL_MSG_PACKET message. After an error,
// p.hasID tells whether the packet can still be given a verdict.
func parsePacket(body []byte, p *queuedPacket) error {
	*p = queuedPacket{}
	if len(body) < nfGenLen {
		return errShort
	}
	family := body[0]
	p.queue = binary.BigEndian.Uint16(body[2:4])
	var etherType uint16
	for b := body[nfGenLen:]; len(b) > 0; {
		if len(b) < nlAttrLen {
			return errShort
		}
		n := int(binary.NativeEndian.Uint16(b[0:2]))
		if n < nlAttrLen || n > len(b) {
			return errShort
		}
		v := b[nlAttrLen:n]
		switch kind := binary.NativeEndian.Uint16(b[2:4]) & attrMask; kind {
		case attrPacketHeader:
			if len(v) < 7 {
				return errShort
			}
			p.id, p.hasID = binary.BigEndian.Uint32(v), true
			etherType, p.hook = binary.BigEndian.Uint16(v[4:]), v[6]
		case attrPayload:
			p.payload = v
		default:
			if err := p.number(kind, v); err != nil {
				return err
			}
		}
		b = b[min(nlAlign(n), len(b)):]
	}
	if !p.hasID {
		return errNoPacket
	}
	p.version = ipVersion(family, etherType)
	// The kernel gives the whole length only of a packet that it has cut.
	p.wireLen = max(p.wireLen, uint32(len(p.payload)))
	return nil
}

// turnsBack tells whether a forwarded packet leaves the node where it came in,
// as one does that a pod sends to itself by way of a Service. Packets of other
// hooks, whose way in isn't known, are given the benefit of the doubt.
func (p *queuedPacket) turnsBack() bool {
	return p.hook != unix.NF_INET_FORWARD || p.inDev == p.outDev && p.physIn == p.physOut
}

// number takes an attribute that is one 32-bit number; others are passed over.
func (p *queuedPacket) number(kind uint16, v []byte) error {
	var to *uint32
	switch kind {
	case attrMark:
		to = &p.mark
	case attrInDev:
		to = &p.inDev
	case attrOutDev:
		to = &p.outDev
	case attrPhysInDev:
		to = &p.physIn
	case attrPhysOutDev:
		to = &p.physOut
	case attrCapLen:
		to = &p.wireLen
	default:
		return nil
	}
	if len(v) < 4 {
		return errShort
	}
	*to = binary.BigEndian.Uint32(v)
	return nil
}

// ipVersion says which IP version's hook a packet came from. The hook's family
// is asked first: a bridged packet's ether type may be that of a VLAN tag.
func ipVersion(family uint8, etherType uint16) uint16 {
	switch {
	case family == unix.AF_INET, family != unix.AF_INET6 && etherType == unix.ETH_P_IP:
		return 4
	case family == unix.AF_INET6, etherType == unix.ETH_P_IPV6:
		return 6
	}
	return 0
}

// verdictMessage is an NFQNL_MSG_VERDICT message in memory of its own that is
// filled anew for each packet.
type verdictMessage struct {
	buf [nlHeaderLen + nfGenLen + nlAttrLen + 8 + nlAttrLen + 4]byte
}

// newVerdictMessage prepares what never changes for a queue.
func newVerdictMessage(queue uint16) *verdictMessage {
	m := &verdictMessage{}
	b := m.buf[:]
	binary.NativeEndian.PutUint16(b[4:], typeVerdict)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	binary.BigEndian.PutUint16(b[18:], queue)
	binary.NativeEndian.PutUint16(b[20:], nlAttrLen+8)
	binary.NativeEndian.PutUint16(b[22:], attrVerdictHeader)
	binary.NativeEndian.PutUint16(b[32:], nlAttrLen+4)
	binary.NativeEndian.PutUint16(b[34:], attrMark)
	return m
}

// accept gives the message that lets packet id through with the given mark.
//
// A plain NF_ACCEPT would take the packet past the rest of the hook that queued
// it, so that rules of others behind ours would miss a connection's first
// packet: the clamping of TCP's segment size, which looks at SYNs alone, stands
// there as a rule. So the packet goes through the hook again (NF_REPEAT); our
// chain knows it by its mark and returns. One that would be queued again
// without end is plainly accepted: where there is no mark to know it by, and
// where it bears the mark and came all the same, since the rule that should
// have let it by is gone until the next repair.
func (m *verdictMessage) accept(id, mark, acceptMark uint32) []byte {
	b := m.buf[:]
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	word := uint32(nfAccept)
	if mark&acceptMark != acceptMark {
		word = nfRepeat
	}
	mark |= acceptMark
	binary.BigEndian.PutUint32(b[24:], word)
	binary.BigEndian.PutUint32(b[28:], id)
	binary.BigEndian.PutUint32(b[36:], mark)
	return b
}

// drop gives the message that turns packet id away, its mark untouched.
func (m *verdictMessage) drop(id uint32) []byte {
	b := m.buf[:len(m.buf)-nlAttrLen-4]
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.BigEndian.PutUint32(b[24:], nfDrop)
	binary.BigEndian.PutUint32(b[28:], id)
	return b
}
