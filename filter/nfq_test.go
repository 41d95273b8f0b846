package filter

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nfqAttr is one attribute with its padding.
func nfqAttr(kind uint16, v ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(nlAttrLen+len(v)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), v...)
	return append(b, make([]byte, nlAlign(len(b))-len(b))...)
}

// nfqBody is a packet message's body.
func nfqBody(family byte, queue uint16, attrs ...[]byte) []byte {
	return append([]byte{family, 0, byte(queue >> 8), byte(queue)}, slices.Concat(attrs...)...)
}

func nfqMessage(kind uint16, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(nlHeaderLen+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(append(b, make([]byte, 10)...), body...)
}

func nfqWhole() []byte {
	return nfqBody(unix.AF_INET6, 103,
		nfqAttr(attrPacketHeader, 0, 0, 1, 2, 0x86, 0xdd, 2),
		nfqAttr(attrInDev, 0, 0, 0, 3), nfqAttr(attrOutDev, 0, 0, 0, 4),
		nfqAttr(attrPhysInDev, 0, 0, 0, 5), nfqAttr(attrPhysOutDev, 0, 0, 0, 6),
		nfqAttr(attrMark, 0, 0, 0x40, 1), nfqAttr(99, 1, 2, 3),
		nfqAttr(attrCapLen, 0, 0, 5, 0xdc), nfqAttr(attrPayload, 0x60, 1, 2))
}

func TestParsePacket(t *testing.T) {
	var p queuedPacket
	if err := parsePacket(nfqWhole(), &p); err != nil {
		t.Fatal(err)
	}
	want := queuedPacket{id: 258, hasID: true, queue: 103, hook: 2, version: 6, mark: 0x4001,
		inDev: 3, outDev: 4, physIn: 5, physOut: 6, wireLen: 1500}
	payload := p.payload
	p.payload = nil
	if !bytes.Equal(payload, []byte{0x60, 1, 2}) || !equalPackets(p, want) {
		t.Errorf("got %+v with payload % x, want %+v", p, payload, want)
	}
}

func equalPackets(a, b queuedPacket) bool {
	samePayload := bytes.Equal(a.payload, b.payload)
	a.payload, b.payload = nil, nil
	return samePayload && a.id == b.id && a.hasID == b.hasID && a.queue == b.queue && a.hook == b.hook &&
		a.version == b.version && a.mark == b.mark && a.wireLen == b.wireLen &&
		[4]uint32{a.inDev, a.outDev, a.physIn, a.physOut} == [4]uint32{b.inDev, b.outDev, b.physIn, b.physOut}
}

func TestParsePacketVersion(t *testing.T) {
	for _, c := range []struct {
		family    byte
		etherType [2]byte
		want      uint16
	}{
		{unix.AF_INET, [2]byte{8, 0}, 4},
		{unix.AF_INET6, [2]byte{0x86, 0xdd}, 6},
		{unix.AF_INET, [2]byte{0x81, 0}, 4},
		{unix.AF_INET6, [2]byte{8, 0}, 6},
		{unix.AF_BRIDGE, [2]byte{8, 0}, 4},
		{unix.AF_BRIDGE, [2]byte{0x86, 0xdd}, 6},
		{unix.AF_BRIDGE, [2]byte{8, 6}, 0},
	} {
		var p queuedPacket
		b := nfqBody(c.family, 1, nfqAttr(attrPacketHeader, 0, 0, 0, 1, c.etherType[0], c.etherType[1], 3))
		if err := parsePacket(b, &p); err != nil || p.version != c.want {
			t.Errorf("family %d, ether type %x: version %d, %v; want %d", c.family, c.etherType, p.version, err, c.want)
		}
	}
}

// The payload comes last in the kernel's messages, so that a cut message still
// names its packet, which can then be turned away.
func TestParsePacketCut(t *testing.T) {
	whole := nfqWhole()
	header := nfGenLen + len(nfqAttr(attrPacketHeader, make([]byte, 7)...))
	for n := range whole {
		var p queuedPacket
		err := parsePacket(whole[:n], &p)
		if (n >= header-1) != p.hasID {
			t.Errorf("cut to %d: has an id: %t", n, p.hasID)
		}
		if err == nil && !p.hasID {
			t.Errorf("cut to %d: no error and no id", n)
		}
		if n > len(whole)-nlAlign(nlAttrLen+3) && n < len(whole)-1 && err == nil {
			t.Errorf("cut to %d, inside the payload: no error", n)
		}
	}
}

func TestParsePacketBad(t *testing.T) {
	header := nfqAttr(attrPacketHeader, 0, 0, 0, 1, 8, 0, 2)
	for _, c := range []struct {
		name  string
		body  []byte
		hasID bool
	}{
		{"nothing", nil, false},
		{"no attributes", nfqBody(2, 1), false},
		{"no header", nfqBody(2, 1, nfqAttr(attrPayload, 0x45)), false},
		{"short header", nfqBody(2, 1, nfqAttr(attrPacketHeader, 0, 0, 0, 1)), false},
		{"attribute of length 0", nfqBody(2, 1, header, []byte{0, 0, 0, 0}), true},
		{"attribute of length 3", nfqBody(2, 1, header, []byte{3, 0, 3, 0}), true},
		{"attribute beyond the end", nfqBody(2, 1, header, []byte{255, 255, 10, 0, 1}), true},
		{"short mark", nfqBody(2, 1, header, nfqAttr(attrMark, 1)), true},
	} {
		var p queuedPacket
		if err := parsePacket(c.body, &p); err == nil || p.hasID != c.hasID {
			t.Errorf("%s: id %t, error %v", c.name, p.hasID, err)
		}
	}
}

func TestNextMessage(t *testing.T) {
	two := append(nfqMessage(typePacket, []byte{1, 2, 3, 4, 5, 0, 0, 0}[:5]), 0, 0, 0)
	two = append(two, nfqMessage(2, []byte{9})...)
	m, rest, err := nextMessage(two)
	if err != nil || m.kind != typePacket || len(m.body) != 5 {
		t.Fatalf("first: %+v, %v", m, err)
	}
	m, rest, err = nextMessage(rest)
	if err != nil || m.kind != 2 || len(m.body) != 1 || len(rest) != 0 {
		t.Fatalf("second: %+v, rest %d, %v", m, len(rest), err)
	}
	for n := range nlHeaderLen {
		if _, _, err := nextMessage(two[:n]); err == nil {
			t.Errorf("%d bytes are a message", n)
		}
	}
	if m, rest, err := nextMessage(two[:18]); err == nil || len(m.body) != 2 || rest != nil {
		t.Errorf("cut message: %+v, %v", m, err)
	}
	if _, rest, err := nextMessage(make([]byte, 64)); err == nil || rest != nil {
		t.Errorf("a message of length 0: %v", err)
	}
}

// What is built by hand is what a netlink library reads.
func TestVerdictMessage(t *testing.T) {
	m := newVerdictMessage(0x1234)
	for _, c := range []struct {
		name    string
		b       []byte
		verdict uint32
		id      uint32
		mark    []byte
	}{
		{"accept", slices.Clone(m.accept(7, 0x4001, 0x1000)), nfRepeat, 7, []byte{0, 0, 0x50, 1}},
		{"drop", slices.Clone(m.drop(8)), nfDrop, 8, nil},
		{"accept for the second time", slices.Clone(m.accept(7, 0x5001, 0x1000)), nfAccept, 7, []byte{0, 0, 0x50, 1}},
		{"accept without a mark", slices.Clone(m.accept(9, 1, 0)), nfAccept, 9, []byte{0, 0, 0, 1}},
	} {
		var msg netlink.Message
		if err := msg.UnmarshalBinary(c.b); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if msg.Header.Type != typeVerdict || msg.Header.Flags != netlink.Request || !bytes.Equal(msg.Data[:4], []byte{0, 0, 0x12, 0x34}) {
			t.Errorf("%s: header %+v, % x", c.name, msg.Header, msg.Data[:4])
		}
		attrs, err := netlink.UnmarshalAttributes(msg.Data[4:])
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		want := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, c.verdict), c.id)
		if attrs[0].Type != attrVerdictHeader || !bytes.Equal(attrs[0].Data, want) {
			t.Errorf("%s: verdict header %+v", c.name, attrs[0])
		}
		if (c.mark != nil) != (len(attrs) == 2) || c.mark != nil && (attrs[1].Type != attrMark || !bytes.Equal(attrs[1].Data, c.mark)) {
			t.Errorf("%s: attributes %+v", c.name, attrs)
		}
	}
}

func TestMessagesNoAllocs(t *testing.T) {
	b, m := nfqMessage(typePacket, nfqWhole()), newVerdictMessage(1)
	var p queuedPacket
	sum := 0
	n := testing.AllocsPerRun(100, func() {
		msg, _, _ := nextMessage(b)
		if parsePacket(msg.body, &p) == nil {
			sum += len(m.accept(p.id, p.mark, 0x1000)) + len(m.drop(p.id))
		}
	})
	if n != 0 || sum == 0 {
		t.Errorf("%v allocations, %d bytes", n, sum)
	}
}

// FuzzParseMessage looks for panics, endless datagrams, and packets that would
// be judged without being named.
func FuzzParseMessage(f *testing.F) {
	f.Add(nfqMessage(typePacket, nfqWhole()))
	f.Add(append(nfqMessage(2, make([]byte, 20)), nfqMessage(typePacket, nfqBody(2, 1))...))
	f.Add(nfqMessage(typePacket, nfqBody(2, 1, nfqAttr(attrPacketHeader, 0, 0, 0, 1, 8, 0, 2), []byte{0, 0, 0, 0})))
	f.Fuzz(func(t *testing.T, b []byte) {
		for rest := b; len(rest) > 0; {
			m, next, err := nextMessage(rest)
			if len(next) >= len(rest) {
				t.Fatal("no progress")
			}
			if err != nil && next != nil {
				t.Fatal("an error, and more to come")
			}
			var p queuedPacket
			if parsePacket(m.body, &p) == nil && (!p.hasID || int(p.wireLen) < len(p.payload)) {
				t.Fatalf("taken for good: %+v", p)
			}
			rest = next
		}
	})
}

func BenchmarkParsePacket(b *testing.B) {
	body := nfqWhole()
	var p queuedPacket
	b.ReportAllocs()
	for b.Loop() {
		if err := parsePacket(body, &p); err != nil {
			b.Fatal(err)
		}
	}
}
