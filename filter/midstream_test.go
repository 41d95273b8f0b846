package filter

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/verdict"
)

// TestMidstream judges segments from the middle of connections between a client,
// 10.0.0.1, and a server, 10.0.0.2, both pods of this node.
func TestMidstream(t *testing.T) {
	const client, server = "10.0.0.1", "10.0.0.2"
	for _, c := range []struct {
		name                     string
		clientIn, clientOut      string
		serverIn, serverOut      string
		from, to, want, judgedAs string
	}{
		{"nobody is isolated", "", "", "", "", "10.0.0.1:40000", "10.0.0.2:80", "allow", ""},
		{"the client's, allowed", "", "", "10.0.0.1:80", "", "10.0.0.1:40000", "10.0.0.2:80", "allow", ""},
		{"the server's, allowed", "", "", "10.0.0.1:80", "", "10.0.0.2:80", "10.0.0.1:40000", "allow", ""},
		{"the client's, denied", "", "", "-", "", "10.0.0.1:40000", "10.0.0.2:80", "deny", "10.0.0.1:40000>10.0.0.2:80"},
		{"the server's, to a denied client", "", "", "-", "", "10.0.0.2:80", "10.0.0.1:40000", "deny", "10.0.0.1:40000>10.0.0.2:80"},
		{"the server's, to a client denied by its own egress", "", "-", "", "", "10.0.0.2:80", "10.0.0.1:40000", "deny", "10.0.0.1:40000>10.0.0.2:80"},
		{"the client's, of a server isolated both ways", "", "", "10.0.0.1:80", "-", "10.0.0.1:40000", "10.0.0.2:80", "allow", ""},
		{"the server's, isolated both ways", "", "", "10.0.0.1:80", "-", "10.0.0.2:80", "10.0.0.1:40000", "deny", "10.0.0.2:80>10.0.0.1:40000"},
		{"a server on a high port, isolated both ways", "", "", "10.0.0.1:50051", "-", "10.0.0.1:40000", "10.0.0.2:50051", "deny", "10.0.0.2:50051>10.0.0.1:40000"},
		{"a server on a high port, isolated one way", "", "", "10.0.0.1:50051", "", "10.0.0.1:40000", "10.0.0.2:50051", "allow", ""},
		{"a denied client on a low port", "", "", "-", "", "10.0.0.2:50051", "10.0.0.1:79", "allow", ""}, // the one that is believed wrongly
		{"a denied client on a low port, of a server that can't reach it", "", "", "-", "-", "10.0.0.2:50051", "10.0.0.1:79", "deny", "10.0.0.2:50051>10.0.0.1:79"},
		{"begun by an ACK from whoever may only be called", "", "10.0.0.9", "", "", "10.0.0.1:40000", "10.0.0.2:22", "deny", "10.0.0.1:40000>10.0.0.2:22"},
		{"begun by an ACK from a low port", "-", "", "", "", "10.0.0.2:80", "10.0.0.1:40000", "deny", "10.0.0.2:80>10.0.0.1:40000"},
	} {
		s := revokeSnapshot(nil, revokePod{client, c.clientIn, c.clientOut}, revokePod{server, c.serverIn, c.serverOut})
		from, to := netip.MustParseAddrPort(c.from), netip.MustParseAddrPort(c.to)
		f := verdict.Flow{Proto: verdict.TCP, Src: from.Addr(), Dst: to.Addr(), SrcPort: from.Port(), DstPort: to.Port()}
		d := s.Decide(&f)
		var turned verdict.Decision
		if turnedDown(s, &f, &d, &turned) {
			d = turned
		}
		judgedAs := fmt.Sprintf("%s>%s", netip.AddrPortFrom(f.Src, f.SrcPort), netip.AddrPortFrom(f.Dst, f.DstPort))
		if d.Verdict.String() != c.want || c.want == "deny" && (judgedAs != c.judgedAs || d.Reason != verdict.ReasonNoRule) {
			t.Errorf("%s: %s, %s, judged as %s", c.name, d.Verdict, d.Reason, judgedAs)
		}
	}
}

// TestMidstreamIsKnown tells the segments that open a connection from all others,
// and asks the decoder anew for each packet.
func TestMidstreamIsKnown(t *testing.T) {
	d := NewDecoder()
	var f verdict.Flow
	for _, c := range []struct {
		flags byte
		want  bool
	}{{tcpSYN, false}, {tcpSYN | 0xc0, false}, {tcpSYN | tcpACK, true}, {tcpACK, true}, {tcpACK | 8, true}, {4, true}, {0, true}} {
		for offset, b := range map[int][]byte{20: decPacket(dec4(6), decTCP()), 40: decPacket(dec6(6), decTCP())} {
			b[offset+13] = c.flags
			d.Decode(uint16(b[0]>>4), b, uint32(len(b)), &f)
			if f.Defect != verdict.ReasonNone || d.Midstream() != c.want {
				t.Errorf("flags %#x: midstream %v, %+v", c.flags, d.Midstream(), f)
			}
		}
		for chunk, want := range map[byte]bool{sctpInit: false, 0: true, 2: true, 4: true} {
			b := decPacket(dec4(132), decSCTP(), decRaw(chunk, 0, 0, 4))
			if d.Decode(4, b, uint32(len(b)), &f); f.Defect != verdict.ReasonNone || d.Midstream() != want {
				t.Errorf("chunk %d: midstream %v, %+v", chunk, d.Midstream(), f)
			}
		}
		bare := decPacket(dec4(132), decSCTP())
		if d.Decode(4, bare, uint32(len(bare)), &f); !d.Midstream() {
			t.Error("an association begins without a chunk")
		}
		udp := decPacket(dec4(17), decUDP())
		if d.Decode(4, udp, uint32(len(udp)), &f); d.Midstream() {
			t.Error("a datagram is taken for the middle of a connection")
		}
	}
	if NewDecoder().Midstream() {
		t.Error("so is nothing at all")
	}
}

// TestWorkerTurnsMidstream has a worker judge an answer from the middle of a denied
// connection, which would be allowed by itself: the log names the connection.
func TestWorkerTurnsMidstream(t *testing.T) {
	engine := queueEngine() // 10.0.0.2 admits UDP alone
	var out strings.Builder
	log := queueLog(&out, 8)
	w := queueTestWorker(engine, log.NewRing(), io.Discard)
	fd, kernel := queuePair(t)
	b := decPacket(dec4(6), decTCP())
	copy(b[12:], []byte{10, 0, 0, 2, 10, 0, 0, 1, 0, 80, 0x9c, 0x40}) // from port 80 to 40000
	b[20+13] = tcpACK
	w.datagram(fd, queueMessage(1, b), time.Now())
	b[20+13] = tcpSYN
	w.datagram(fd, queueMessage(2, b), time.Now())
	if got := queueVerdicts(t, kernel); got != "drop 1, repeat 2 mark 0.0.80.0" {
		t.Errorf("verdicts: %s", got)
	}
	kernelOK(t, log.Close())
	if got := out.String(); !strings.Contains(got, `"verdict":"deny"`) || !strings.Contains(got, `"dst":{"ip":"10.0.0.2"`) {
		t.Errorf("the log: %s", got)
	}
}
