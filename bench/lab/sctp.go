package lab

import (
	"encoding/binary"
	"hash/crc32"
)

// Chunk types of RFC 9260, section 3.2.
const (
	sctpInit    = 1
	sctpInitAck = 2
	sctpAbort   = 6
)

// sctpPacket is a packet with the one chunk that opens an association, or turns
// that down.
type sctpPacket struct {
	src, dst uint16
	vtag     uint32
	chunk    byte
	initTag  uint32 // of an INIT or INIT ACK
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// marshal builds the packet as RFC 9260, sections 3.1 and 3.3, draw it, with
// its CRC32c, without which connection tracking takes it for invalid.
func (p sctpPacket) marshal() []byte {
	b := make([]byte, 12, 48)
	binary.BigEndian.PutUint16(b[0:], p.src)
	binary.BigEndian.PutUint16(b[2:], p.dst)
	binary.BigEndian.PutUint32(b[4:], p.vtag)
	var body []byte
	if p.chunk != sctpAbort {
		body = binary.BigEndian.AppendUint32(body, p.initTag)
		body = binary.BigEndian.AppendUint32(body, 64<<10) // receiver window
		body = binary.BigEndian.AppendUint16(body, 1)      // outbound streams
		body = binary.BigEndian.AppendUint16(body, 1)      // inbound streams
		body = binary.BigEndian.AppendUint32(body, 1)      // initial TSN
	}
	if p.chunk == sctpInitAck {
		body = append(body, 0, 7, 0, 8, 'l', 'a', 'b', '!') // state cookie, which an INIT ACK must have
	}
	b = append(b, p.chunk, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(4+len(body)))
	b = append(b, body...)
	// The CRC goes in with its least significant byte first (RFC 9260,
	// appendix A).
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// parseSCTP reads the common header and the first chunk; false for anything too
// short or with a wrong CRC.
func parseSCTP(b []byte) (p sctpPacket, ok bool) {
	if len(b) < 16 {
		return p, false
	}
	sum := binary.LittleEndian.Uint32(b[8:])
	zeroed := append([]byte(nil), b...)
	clear(zeroed[8:12])
	if crc32.Checksum(zeroed, castagnoli) != sum {
		return p, false
	}
	p.src = binary.BigEndian.Uint16(b[0:])
	p.dst = binary.BigEndian.Uint16(b[2:])
	p.vtag = binary.BigEndian.Uint32(b[4:])
	p.chunk = b[12]
	if p.chunk == sctpInit || p.chunk == sctpInitAck {
		if len(b) < 20 {
			return p, false
		}
		p.initTag = binary.BigEndian.Uint32(b[16:])
	}
	return p, true
}
