package filter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

// queueEngine judges a cluster of one pod, 10.0.0.2 and fd00::2 (the packets'
// destination), which the policy a/p isolates in ingress and opens for UDP.
func queueEngine() *verdict.Engine {
	pod := &verdict.Endpoint{Namespace: "a", Name: "db", Judged: true, Meaning: 1,
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		Ingress: verdict.NewTable([]verdict.Policy{{Name: "a/p", Rules: []verdict.Rule{
			{AnyPeer: true, Ports: []verdict.PortRange{{Proto: verdict.UDP, First: 0, Last: 65535}}},
		}}}, nil, nil)}
	owners := map[netip.Addr]*verdict.Endpoint{}
	for _, a := range pod.Addrs {
		owners[a] = pod
	}
	e := verdict.NewEngine()
	e.Swap(verdict.NewSnapshot(verdict.Input{Generation: 1, Owners: owners}, nil))
	return e
}

// queuePair is a worker's end of a socket, and the end where its verdicts come
// out.
func queuePair(t *testing.T) (worker, kernel int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	return fds[0], fds[1]
}

// queueLog is a decision log of everything, a line each.
func queueLog(w io.Writer, ringSize int) *audit.Log {
	return audit.NewLog(audit.Config{Node: "n1", Sinks: []audit.Sink{{Name: "test", W: w}}, RingSize: ringSize})
}

func queueTestWorker(engine *verdict.Engine, ring *audit.Ring, lg io.Writer) *worker {
	cfg, err := QueueConfig{Base: 7, Count: 1, AcceptMark: 0x1000, CacheSize: 16}.complete()
	if err != nil {
		panic(err)
	}
	return newWorker(7, cfg, engine, ring, slog.New(slog.NewTextHandler(lg, nil)))
}

// queueMessage is the kernel's message about a packet with the mark 0x4000.
func queueMessage(id byte, packet []byte) []byte {
	family := byte(unix.AF_INET)
	if packet[0]>>4 == 6 {
		family = unix.AF_INET6
	}
	return nfqMessage(typePacket, nfqBody(family, 7, nfqAttr(attrPacketHeader, 0, 0, 0, id, 8, 0, 2),
		nfqAttr(attrMark, 0, 0, 0x40, 0), nfqAttr(attrPayload, packet...)))
}

// queueVerdicts reads what the worker has written: "repeat 1 mark 5000", "drop 2".
func queueVerdicts(t *testing.T, fd int) string {
	t.Helper()
	var words []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return strings.Join(words, ", ")
		}
		if err != nil || n < 32 || buf[19] != 7 {
			t.Fatalf("%d bytes, %v: % x", n, err, buf[:max(n, 0)])
		}
		word := "drop "
		switch binary.BigEndian.Uint32(buf[24:]) {
		case nfAccept:
			word = "accept "
		case nfRepeat:
			word = "repeat "
		}
		word += string('0' + rune(binary.BigEndian.Uint32(buf[28:])))
		if n == 40 {
			word += " mark " + strings.ToLower(netip.AddrFrom4([4]byte(buf[36:40])).String())
		}
		words = append(words, word)
	}
}

func TestWorker(t *testing.T) {
	udp, tcp := decPacket(dec4(17), decUDP()), decPacket(dec4(6), decTCP())
	cut := queueMessage(3, udp)
	unnamed := nfqMessage(typePacket, nfqBody(2, 7, nfqAttr(attrPayload, udp...)))
	refusal := nfqMessage(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff})
	consent := nfqMessage(unix.NLMSG_ERROR, make([]byte, 4))
	for _, c := range []struct {
		name string
		b    []byte
		want string
		stat func(s QueueStats) uint64
	}{
		{"allowed", queueMessage(1, udp), "repeat 1 mark 0.0.80.0", func(s QueueStats) uint64 { return s.Decisions[verdict.ReasonRule][verdict.Allow] }},
		{"denied", queueMessage(2, tcp), "drop 2", func(s QueueStats) uint64 { return s.Decisions[verdict.ReasonNoRule][verdict.Deny] }},
		{"allowed, ipv6", queueMessage(1, decPacket(dec6(17), decUDP())), "repeat 1 mark 0.0.80.0", func(s QueueStats) uint64 { return s.Ingress[verdict.ReasonRule][verdict.Allow] }},
		{"not isolated", queueMessage(1, decSet(decPacket(dec4(6), decTCP()), 19, 9)), "repeat 1 mark 0.0.80.0", func(s QueueStats) uint64 { return s.Verdicts(verdict.Allow) }},
		{"defective", queueMessage(4, udp[:21]), "drop 4", func(s QueueStats) uint64 { return s.Decisions[verdict.ReasonMalformed][verdict.Deny] }},
		{"two at once", append(queueMessage(1, udp), queueMessage(2, tcp)...), "repeat 1 mark 0.0.80.0, drop 2", func(s QueueStats) uint64 { return s.Packets - 1 }},
		{"cut message", cut[:len(cut)-2], "drop 3", func(s QueueStats) uint64 { return s.Unparsed }},
		{"packet without an id", unnamed, "", func(s QueueStats) uint64 { return s.Unparsed }},
		{"something else", nfqMessage(1, nil), "", func(s QueueStats) uint64 { return s.Unparsed }},
		{"a verdict refused", refusal, "", func(s QueueStats) uint64 { return s.VerdictErrors }},
		{"a consent", consent, "", func(s QueueStats) uint64 { return 1 - s.VerdictErrors - s.Unparsed }},
	} {
		in, out := queuePair(t)
		w := queueTestWorker(queueEngine(), nil, io.Discard)
		w.datagram(in, c.b, time.Now())
		if got := queueVerdicts(t, out); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if s := w.count.stats(7); c.stat(s) != 1 {
			t.Errorf("%s: %+v", c.name, s)
		}
	}
}

// Before there is policy, nothing passes.
func TestWorkerNotReady(t *testing.T) {
	in, out := queuePair(t)
	w := queueTestWorker(verdict.NewEngine(), nil, io.Discard)
	w.datagram(in, queueMessage(1, decPacket(dec4(17), decUDP())), time.Now())
	if got := queueVerdicts(t, out); got != "drop 1" {
		t.Errorf("%q", got)
	}
}

// A panic drops its packet, is said once with its stack, and the next packet is
// judged as ever.
func TestWorkerPanic(t *testing.T) {
	in, out := queuePair(t)
	var said bytes.Buffer
	w := queueTestWorker(queueEngine(), nil, &said)
	udp := decPacket(dec4(17), decUDP())
	for id := byte(1); id < 5; id += 2 {
		w.judge = nil
		w.datagram(in, append(queueMessage(id, udp), queueMessage(id+1, udp)...), time.Now())
	}
	if got := queueVerdicts(t, out); got != "drop 1, repeat 2 mark 0.0.80.0, drop 3, repeat 4 mark 0.0.80.0" {
		t.Errorf("%q", got)
	}
	if s := w.count.stats(7); s.Panics != 2 || s.Packets != 4 || s.Verdicts(verdict.Allow) != 2 {
		t.Errorf("%+v", s)
	}
	if n := strings.Count(said.String(), "panic="); n != 1 || !strings.Contains(said.String(), "queueworker.go") {
		t.Errorf("said %d times: %s", n, said.String())
	}
}

// A panic after the verdict is out must not send another one.
func TestWorkerPanicAfterVerdict(t *testing.T) {
	in, out := queuePair(t)
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	w.count.reasons = nil
	w.datagram(in, queueMessage(1, decPacket(dec4(17), decUDP())), time.Now())
	if got := queueVerdicts(t, out); got != "repeat 1 mark 0.0.80.0" || w.count.panics.Load() != 1 {
		t.Errorf("%q, %d panics", got, w.count.panics.Load())
	}
}

func TestWorkerErrors(t *testing.T) {
	var said bytes.Buffer
	w := queueTestWorker(queueEngine(), nil, &said)
	for _, err := range []error{unix.EAGAIN, unix.EINTR, unix.ENOBUFS, unix.ENOBUFS, unix.EBADF} {
		w.readFailed(err)
	}
	w.datagram(-1, queueMessage(1, decPacket(dec4(17), decUDP())), time.Now())
	w.datagram(-1, queueMessage(2, decPacket(dec4(17), decUDP())), time.Now())
	s := w.count.stats(7)
	if s.ReadErrors != 3 || s.VerdictErrors != 2 || strings.Count(said.String(), "\n") != 2 {
		t.Errorf("%+v\n%s", s, said.String())
	}
}

// The record follows the verdict, with the decision that it was.
func TestWorkerRecords(t *testing.T) {
	in, out := queuePair(t)
	var lines bytes.Buffer
	log := queueLog(&lines, 16)
	w := queueTestWorker(queueEngine(), log.NewRing(), io.Discard)
	udp := decPacket(dec4(17), decUDP())
	received := time.Date(2025, 1, 2, 3, 4, 5, 6, time.UTC)
	w.datagram(in, queueMessage(1, udp), received)
	w.datagram(in, queueMessage(2, udp), received)
	if err := log.Close(); err != nil || queueVerdicts(t, out) == "" {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSpace(lines.String()), "\n")
	for i, want := range []string{`"cached":false`, `"cached":true`} {
		if len(got) != 2 || !strings.Contains(got[i], want) || !strings.Contains(got[i], `"time":"2025-01-02T03:04:05.000000006Z","node":"n1","verdict":"allow"`) ||
			!strings.Contains(got[i], `"policy":"a/p","rule":0`) {
			t.Errorf("line %d: %s", i, got)
		}
	}
}

func TestWorkerNoAllocs(t *testing.T) {
	in, out := queuePair(t)
	ring := queueLog(io.Discard, 16).NewRing()
	w := queueTestWorker(queueEngine(), ring, io.Discard)
	buf := make([]byte, 64)
	for name, b := range map[string][]byte{
		"allowed": queueMessage(1, decPacket(dec4(17), decUDP())),
		"denied":  queueMessage(1, decPacket(dec6(6), decTCP())),
		"cut":     queueMessage(1, decPacket(dec6(6), decTCP()))[:80],
	} {
		n := testing.AllocsPerRun(200, func() {
			w.datagram(in, b, time.Now())
			unix.Read(out, buf)
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestLatencyBuckets(t *testing.T) {
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	d := &verdict.Decision{}
	for _, l := range []time.Duration{0, time.Microsecond, time.Microsecond + 1, 10 * time.Millisecond, time.Second} {
		w.count.decided(d, l)
	}
	s := w.count.stats(7)
	last := len(LatencyBounds())
	if s.Latency[0] != 2 || s.Latency[1] != 1 || s.Latency[last-1] != 1 || s.Latency[last] != 1 || s.LatencySum < time.Second {
		t.Errorf("%+v", s.Latency)
	}
	e := s.LatencyExponential
	if e[0] != 1 || e[1] != 2 || e[len(e)-1] != 0 || slices.Max(e) != 2 {
		t.Errorf("exponential: %v", e)
	}
	for i, b := range exponentialBounds {
		// Bucket i ends at 2^(i/4) seconds; a nanosecond is the clock's.
		if want := math.Exp2(float64(ExponentialFirst+i) / 4); math.Abs(b.Seconds()-want) > 1e-9 || bucketOf(exponentialBounds[:], b) != i || bucketOf(exponentialBounds[:], b+1) != i+1 {
			t.Errorf("bucket %d ends at %v, want %v s", i, b, want)
		}
	}
	for i, b := range LatencyBounds()[1:] {
		if b <= LatencyBounds()[i] {
			t.Errorf("bounds out of order: %v", LatencyBounds())
		}
	}
}

// BenchmarkWorker measures a packet's way through user space, two system calls
// on a socket pair included.
func BenchmarkWorker(b *testing.B) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	msg, buf := queueMessage(1, decPacket(dec4(17), decUDP())), make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		w.datagram(fds[0], msg, time.Now())
		unix.Read(fds[1], buf)
	}
}

// A pod reaches itself through a Service, by the way that it came. What comes
// another way in its name is forged.
func TestWorkerForged(t *testing.T) {
	self := decSet(decPacket(dec4(6), decTCP()), 12, 10, 0, 0, 2)
	const forward, output = unix.NF_INET_FORWARD, unix.NF_INET_LOCAL_OUT
	for _, c := range []struct {
		name                     string
		hook                     byte
		in, out, physIn, physOut byte
		want                     string
	}{
		{"hairpin of a routed pod", forward, 3, 3, 0, 0, "repeat 1 mark 0.0.16.0"},
		{"hairpin of a bridged pod", forward, 4, 4, 7, 7, "repeat 1 mark 0.0.16.0"},
		{"translated by IPVS", output, 0, 3, 0, 0, "repeat 1 mark 0.0.16.0"},
		{"from another device", forward, 5, 3, 0, 0, "drop 1"},
		{"from another port of the bridge", forward, 4, 4, 8, 7, "drop 1"},
		{"from a port, by the bridge's address", forward, 4, 4, 8, 0, "drop 1"},
	} {
		in, out := queuePair(t)
		log := queueLog(io.Discard, 16)
		w := queueTestWorker(queueEngine(), log.NewRing(), io.Discard)
		attrs := [][]byte{nfqAttr(attrPacketHeader, 0, 0, 0, 1, 8, 0, c.hook), nfqAttr(attrPayload, self...)}
		for kind, index := range map[uint16]byte{attrInDev: c.in, attrOutDev: c.out, attrPhysInDev: c.physIn, attrPhysOutDev: c.physOut} {
			if index != 0 {
				attrs = append(attrs, nfqAttr(kind, 0, 0, 0, index))
			}
		}
		m := nfqMessage(typePacket, nfqBody(unix.AF_INET, 7, attrs...))
		for range 2 { // decided, and from the cache
			w.datagram(in, m, time.Now())
			if got := queueVerdicts(t, out); got != c.want {
				t.Errorf("%s: %q, want %q", c.name, got, c.want)
			}
		}
		forged := w.count.stats(7).Decisions[verdict.ReasonForged][verdict.Deny]
		if (forged == 2) != (c.want == "drop 1") {
			t.Errorf("%s: %d decisions for forgery", c.name, forged)
		}
		if err := log.Close(); err != nil || log.Stats().Sinks[0].Written != 2 {
			t.Errorf("%s: %d decisions logged, %v", c.name, log.Stats().Sinks[0].Written, err)
		}
	}
}
