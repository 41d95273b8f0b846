package filter

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/verdict"
)

// queueBurst sends datagrams to a worker's socket, has it serve them by one read, and
// gives what it has written: the verdicts' ids, a datagram in brackets.
func queueBurst(t *testing.T, w *worker, in, out int, datagrams ...[]byte) (written string) {
	t.Helper()
	for _, b := range datagrams {
		if _, err := unix.Write(out, b); err != nil {
			t.Fatal(err)
		}
	}
	n, err := w.in.read(in)
	if err != nil {
		t.Fatal(err)
	}
	w.datagrams(in, n, time.Now())
	var all []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(out, buf)
		if err != nil {
			return fmt.Sprint(all)
		}
		var ids []string
		for b := buf[:n]; len(b) > 0; b = b[binary.NativeEndian.Uint32(b):] {
			ids = append(ids, fmt.Sprint(map[uint32]string{nfDrop: "-", nfRepeat: "+"}[binary.BigEndian.Uint32(b[24:])], binary.BigEndian.Uint32(b[28:])))
		}
		all = append(all, "("+strings.Join(ids, " ")+")")
	}
}

// TestWorkerBurst: packets that wait are answered in order and by one write; what comes
// between them that isn't a packet changes nothing of that.
func TestWorkerBurst(t *testing.T) {
	udp, tcp := decPacket(dec4(17), decUDP()), decPacket(dec4(6), decTCP())
	packet := func(id byte) []byte { return queueMessage(id, udp) }
	refusal := nfqMessage(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff})
	many := make([][]byte, DefaultBurst)
	want := ""
	for i := range many {
		many[i] = packet(byte(i))
		want += fmt.Sprintf(" +%d", i)
	}
	for _, c := range []struct {
		name      string
		datagrams [][]byte
		want      string
	}{
		{"a lone packet", [][]byte{packet(1)}, "[(+1)]"},
		{"several", [][]byte{packet(1), queueMessage(2, tcp), packet(3)}, "[(+1 -2 +3)]"},
		{"a full burst", many, "[(" + want[1:] + ")]"},
		{"a refusal between", [][]byte{packet(1), refusal, packet(3)}, "[(+1 +3)]"},
		{"a refusal at the end", [][]byte{packet(1), packet(2), refusal}, "[(+1 +2)]"},
		{"nothing but a refusal", [][]byte{refusal}, "[]"},
		{"one that is cut", [][]byte{packet(1), packet(2)[:60], packet(3)}, "[(+1 -2 +3)]"},
		{"several messages in a datagram", [][]byte{append(packet(1), packet(2)...), packet(3)}, "[(+1 +2 +3)]"},
	} {
		in, out := queuePair(t)
		w := queueTestWorker(queueEngine(), nil, io.Discard)
		if got := queueBurst(t, w, in, out, c.datagrams...); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestWorkerBurstIsBounded: what a read leaves waits for the next.
func TestWorkerBurstIsBounded(t *testing.T) {
	in, out := queuePair(t)
	cfg, err := QueueConfig{Base: 7, Count: 1, AcceptMark: 0x1000, Burst: 2}.complete()
	kernelOK(t, err)
	w := newWorker(7, cfg, queueEngine(), nil, kernelQuiet())
	udp := decPacket(dec4(17), decUDP())
	if got := queueBurst(t, w, in, out, queueMessage(1, udp), queueMessage(2, udp), queueMessage(3, udp)); got != "[(+1 +2)]" {
		t.Errorf("at first %s", got)
	}
	if got := queueBurst(t, w, in, out); got != "[(+3)]" {
		t.Errorf("then %s", got)
	}
}

// TestWorkerBurstPanic: a panic drops its own packet, and none of the others.
func TestWorkerBurstPanic(t *testing.T) {
	in, out := queuePair(t)
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	w.judge = nil
	udp := decPacket(dec4(17), decUDP())
	if got := queueBurst(t, w, in, out, queueMessage(1, udp), queueMessage(2, udp)); got != "[(-1 +2)]" {
		t.Error(got)
	}
	w.count.reasons = nil // panics when the verdict is given already
	if got := queueBurst(t, w, in, out, queueMessage(3, udp), queueMessage(4, udp)); got != "[(+3 +4)]" {
		t.Error(got)
	}
	if s := w.count.panics.Load(); s != 3 {
		t.Errorf("%d panics", s)
	}
}

// TestWorkerBurstUnwritten: each verdict that a failed write held is counted, and none
// is written later, for another packet's id may be the same by then.
func TestWorkerBurstUnwritten(t *testing.T) {
	in, out := queuePair(t)
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	udp := decPacket(dec4(17), decUDP())
	for id := byte(1); id <= 3; id++ {
		if _, err := unix.Write(out, queueMessage(id, udp)); err != nil {
			t.Fatal(err)
		}
	}
	n, err := w.in.read(in)
	kernelOK(t, err)
	w.datagrams(-1, n, time.Now())
	if s := w.count.stats(7); s.VerdictErrors != 3 || s.Verdicts(verdict.Allow) != 3 {
		t.Errorf("%+v", s)
	}
	if got := queueBurst(t, w, in, out, queueMessage(4, udp)); got != "[(+4)]" {
		t.Error(got)
	}
}

func TestWorkerBurstNoAllocs(t *testing.T) {
	in, out := queuePair(t)
	w := queueTestWorker(queueEngine(), queueLog(io.Discard, 64).NewRing(), io.Discard)
	udp := queueMessage(1, decPacket(dec4(17), decUDP()))
	buf := make([]byte, 4096)
	n := testing.AllocsPerRun(200, func() {
		for range 5 {
			unix.Write(out, udp)
		}
		n, _ := w.in.read(in)
		w.datagrams(in, n, time.Now())
		unix.Read(out, buf)
	})
	if n != 0 || w.count.packets.Load() != 5*201 {
		t.Errorf("%v allocations for a burst, %d packets", n, w.count.packets.Load())
	}
}

// BenchmarkWorkerBurst measures packets' way through user space when several wait, per
// packet, with the kernel's part played by a socket pair.
func BenchmarkWorkerBurst(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	msg, buf := queueMessage(1, decPacket(dec4(17), decUDP())), make([]byte, 4096)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		unix.Write(fds[1], msg)
		if i%8 == 7 {
			n, _ := w.in.read(fds[0])
			w.datagrams(fds[0], n, time.Now())
			unix.Read(fds[1], buf)
		}
	}
}
