package proof

import (
	"encoding/binary"
	"testing"
	"time"
)

// message is a packet message with the attributes that a reader needs.
func message(id uint32, stamp time.Time) []byte {
	b := make([]byte, 20)
	binary.NativeEndian.PutUint16(b[4:], packetMessage)
	b = binary.NativeEndian.AppendUint16(b, 11) // NFQA_PACKET_HDR, padded to 12
	b = binary.NativeEndian.AppendUint16(b, 1)
	b = append(binary.BigEndian.AppendUint32(b, id), 8, 0, 2, 0)
	if !stamp.IsZero() {
		b = binary.NativeEndian.AppendUint16(b, 20) // NFQA_TIMESTAMP
		b = binary.NativeEndian.AppendUint16(b, 4)
		b = binary.BigEndian.AppendUint64(b, uint64(stamp.Unix()))
		b = binary.BigEndian.AppendUint64(b, uint64(stamp.Nanosecond()/1000))
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestPacketMessages(t *testing.T) {
	at := time.Unix(1_700_000_000, 123_456_000)
	m := message(7, at)
	if id, ok := packetID(m); !ok || id != 7 {
		t.Errorf("packet %d, %v", id, ok)
	}
	if stamp, ok := arrival(m); !ok || stamp != at.UnixNano() {
		t.Errorf("arrived at %d, %v", stamp, ok)
	}
	if _, ok := arrival(message(7, time.Time{})); ok {
		t.Error("a stamp that isn't there")
	}
	for n := range m {
		packetID(m[:n])
		if n >= 20 {
			arrival(m[:n])
		}
	}
	m[4] = 2 // an error, not a packet
	m[5] = 0
	if _, ok := packetID(m); ok {
		t.Error("an error was taken for a packet")
	}
}

func TestVerdicts(t *testing.T) {
	plain := (&echoWorker{queue: 100}).verdict(nil)
	again := (&echoWorker{queue: 100, cfg: echoConfig{again: true}}).verdict(plain)
	if len(plain) != plainVerdictLen || int(binary.NativeEndian.Uint32(plain)) != len(plain) {
		t.Errorf("%d bytes, said to be %d", len(plain), binary.NativeEndian.Uint32(plain))
	}
	if m := again[plainVerdictLen:]; len(m) != markedVerdictLen || int(binary.NativeEndian.Uint32(m)) != len(m) || binary.BigEndian.Uint32(m[36:]) != acceptMark {
		t.Errorf("%v", m)
	}
}
