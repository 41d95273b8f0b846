package filter

import (
	"bytes"
	"io"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

// holdBench is a worker on a socket pair, and an engine that looks out for unknown
// pods in 10.0.0.0/24, where db, 10.0.0.2, lets nobody but its clients in.
type holdBench struct {
	*testing.T
	w       *worker
	in, out int
	s       *verdict.Snapshot
	ranges  *verdict.PodRanges
	start   time.Time
}

func newHoldBench(t *testing.T, v verdict.Verdict, ring *audit.Ring, max int) *holdBench {
	b := &holdBench{T: t, start: time.Now()}
	b.in, b.out = queuePair(t)
	e := verdict.NewEngine()
	b.w = queueTestWorker(e, ring, io.Discard)
	b.w.cfg.Hold, b.w.cfg.HoldMax = time.Second, max
	b.ranges = verdict.NewPodRanges([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}, v)
	clients := verdict.Rule{AnyPort: true, Selectors: []verdict.PeerSelector{{Namespace: 0, Pod: 0}}}
	db := &verdict.Endpoint{Namespace: "a", Name: "db", UID: "db", Judged: true, Meaning: 1, LabelsIndex: 1,
		Addrs:   []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, 2})},
		Ingress: verdict.NewTable([]verdict.Policy{{Name: "a/p", Rules: []verdict.Rule{clients}}}, []verdict.Bits{{1}}, []verdict.Bits{{1}})}
	b.s = verdict.NewSnapshot(verdict.Input{Generation: 1, Owners: map[netip.Addr]*verdict.Endpoint{db.Addrs[0]: db}, Ranges: b.ranges,
		NamespaceBits: []verdict.Bits{{1}}, PodBits: []verdict.Bits{{1}}}, nil)
	e.Swap(b.s)
	return b
}

// known makes the pod of an address known, as a client of db's or as another.
func (b *holdBench) known(last byte, client bool) {
	a := netip.AddrFrom4([4]byte{10, 0, 0, last})
	pod := &verdict.Endpoint{Namespace: "a", Name: "p", UID: string(last), Judged: true, Meaning: uint64(last), Addrs: []netip.Addr{a}}
	if !client {
		pod.LabelsIndex = 1
	}
	b.s = b.s.Next(verdict.Change{Generation: b.s.Generation() + 1, Ranges: b.ranges, Owners: map[netip.Addr]*verdict.Endpoint{a: pod},
		NamespaceBits: []verdict.Bits{{1}}, PodBits: []verdict.Bits{{1}}})
	b.w.engine.Swap(b.s)
}

// from sends db a packet of an address.
func (b *holdBench) from(id, last byte, ago time.Duration) {
	b.w.datagram(b.in, queueMessage(id, decSet(decPacket(dec4(17), decUDP()), 12, 10, 0, 0, last)), b.start.Add(-ago))
}

func (b *holdBench) want(what, verdicts string, s HoldStats) {
	b.Helper()
	if got := strings.ReplaceAll(queueVerdicts(b.T, b.out), " mark 0.0.80.0", ""); got != verdicts {
		b.Errorf("%s: %q, want %q", what, got, verdicts)
	}
	if got := b.w.count.stats(7).Hold; got != s {
		b.Errorf("%s: %+v, want %+v", what, got, s)
	}
	if int(s.Now) != len(b.w.held.list) {
		b.Errorf("%s: %d packets in the list, %d counted", what, len(b.w.held.list), s.Now)
	}
	shares := map[netip.Addr]int{}
	for _, h := range b.w.held.list {
		shares[h.flow.Src]++
		if h.to.IsValid() {
			shares[h.to]++
		}
	}
	if !maps.Equal(shares, b.w.held.shares) {
		b.Errorf("%s: shares %v, want %v", what, b.w.held.shares, shares)
	}
}

// TestHold: packets of unknown pods wait, those of others don't, and what waited is
// judged as soon as it can be, in its order.
func TestHold(t *testing.T) {
	var lines bytes.Buffer
	log := queueLog(&lines, 64)
	b := newHoldBench(t, verdict.Deny, log.NewRing(), 64)
	b.from(1, 9, 300*time.Millisecond)
	b.from(2, 8, 200*time.Millisecond)
	b.from(3, 9, 0)
	b.w.review(b.in)
	b.want("unknown", "", HoldStats{Now: 3, Total: 3})
	b.known(7, true) // another
	b.w.review(b.in)
	b.want("another is known", "", HoldStats{Now: 3, Total: 3})
	b.from(4, 7, 0)
	b.want("of the other", "repeat 4", HoldStats{Now: 3, Total: 3})
	b.known(9, true)
	b.from(5, 9, 0) // the worker sees the change with the next packet of the flow
	b.want("a client is known", "repeat 1, repeat 3, repeat 5", HoldStats{Now: 1, Total: 3, Known: [verdict.VerdictCount]uint64{0, 2}})
	b.known(8, false)
	b.w.review(b.in)
	b.want("one that may not is known", "drop 2", HoldStats{Total: 3, Known: [verdict.VerdictCount]uint64{1, 2}})
	b.from(6, 9, 0)
	b.want("nothing is held", "repeat 6", HoldStats{Total: 3, Known: [verdict.VerdictCount]uint64{1, 2}})
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	records := lines.String()
	if n := strings.Count(records, "\n"); n != 6 || strings.Contains(records, "unknown-pod") {
		t.Errorf("%d records, want 6 and none of an unknown pod:\n%s", n, records)
	}
}

// TestHoldExpires: what doesn't become known in time gets the verdict for that.
func TestHoldExpires(t *testing.T) {
	for _, v := range []verdict.Verdict{verdict.Deny, verdict.Allow} {
		var lines bytes.Buffer
		log := queueLog(&lines, 64)
		b := newHoldBench(t, v, log.NewRing(), 64)
		b.from(1, 9, 1200*time.Millisecond)
		b.w.datagram(b.in, queueMessage(2, decSet(decPacket(dec4(17), decUDP()), 12, 10, 0, 0, 9, 10, 0, 0, 8)), b.start.Add(-1100*time.Millisecond))
		b.from(3, 9, 0)
		b.w.review(b.in)
		// To db it is an outsider, whatever becomes of unknown pods.
		want := HoldStats{Now: 1, Total: 3, Expired: [verdict.VerdictCount]uint64{2, 0}}
		words := "drop 1, drop 2"
		if v == verdict.Allow {
			words, want.Expired = "drop 1, repeat 2", [verdict.VerdictCount]uint64{1, 1}
		}
		b.want("time is up, "+v.String(), words, want)
		b.w.handBack(b.in)
		want.Now, want.Returned = 0, 1
		if got := queueVerdicts(t, b.out); got != "repeat 3 mark 0.0.64.0" {
			t.Errorf("given back: %q", got)
		}
		b.want("given back", "", want)
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{`"reason":"no-rule"`, `"verdict":"` + v.String() + `","reason":"unknown-pod"`, `{"ip":"10.0.0.9","port":5000,"kind":"unknown"}`} {
			if !strings.Contains(lines.String(), text) {
				t.Errorf("%s: no %s in\n%s", v, text, lines.String())
			}
		}
	}
}

// TestHoldIsBounded: there is room for so many, and for a part of them of one address.
func TestHoldIsBounded(t *testing.T) {
	b := newHoldBench(t, verdict.Deny, nil, 16)
	for range 4 {
		b.from(1, 9, 0)
	}
	b.want("of one address", "drop 1, drop 1", HoldStats{Now: 2, Total: 2, Full: 2})
	for i := range byte(20) {
		b.from(2, 20+i, 0)
	}
	b.want("of many", strings.TrimSuffix(strings.Repeat("drop 2, ", 6), ", "), HoldStats{Now: 16, Total: 16, Full: 8})
	b.known(9, true)
	b.w.review(b.in)
	b.want("one is known", "repeat 1, repeat 1", HoldStats{Now: 14, Total: 16, Full: 8, Known: [verdict.VerdictCount]uint64{0, 2}})
}

// TestHoldIsShared: nor does who is known take all the room by what it sends to those
// who aren't; nor what is sent to one of them.
func TestHoldIsShared(t *testing.T) {
	b := newHoldBench(t, verdict.Deny, nil, 16)
	to := func(id, src, dst byte) {
		b.w.datagram(b.in, queueMessage(id, decSet(decPacket(dec4(17), decUDP()), 12, 10, 0, 0, src, 10, 0, 0, dst)), b.start)
	}
	b.known(7, true)
	for i := range byte(5) {
		to(1, 7, 100+i)
	}
	b.want("a scan", "drop 1, drop 1, drop 1", HoldStats{Now: 2, Total: 2, Full: 3})
	for i := range byte(5) {
		to(2, 200+i, 99)
	}
	b.want("many to one", "drop 2, drop 2, drop 2", HoldStats{Now: 4, Total: 4, Full: 6})
	to(3, 150, 2)
	b.want("another's", "", HoldStats{Now: 5, Total: 5, Full: 6})
}

// TestHoldOff: with no time to wait, the verdict is at once the one for the end.
func TestHoldOff(t *testing.T) {
	b := newHoldBench(t, verdict.Deny, nil, 16)
	b.w.cfg.Hold = 0
	b.from(1, 9, 0)
	b.want("off", "drop 1", HoldStats{})
}

// TestHoldPanic: a panic over a held packet drops that one, and no other.
func TestHoldPanic(t *testing.T) {
	b := newHoldBench(t, verdict.Deny, nil, 16)
	b.from(1, 9, 0)
	b.from(2, 8, 0)
	b.known(8, true)
	b.w.judge = nil // as in TestWorkerPanic
	b.w.review(b.in)
	if b.w.count.panics.Load() != 1 {
		t.Errorf("%d panics", b.w.count.panics.Load())
	}
	b.want("a panic", "drop 1, repeat 2", HoldStats{Total: 2, Known: [verdict.VerdictCount]uint64{0, 1}})
}

// TestHoldNoAllocs: while packets of unknown pods are held, those of known pods cost
// nothing more.
func TestHoldNoAllocs(t *testing.T) {
	b := newHoldBench(t, verdict.Deny, nil, 16)
	b.known(7, true)
	b.from(1, 9, 0)
	msg, buf := queueMessage(2, decSet(decPacket(dec4(17), decUDP()), 12, 10, 0, 0, 7)), make([]byte, 4096)
	n := testing.AllocsPerRun(200, func() {
		b.w.datagram(b.in, msg, b.start)
		b.w.review(b.in)
		if n, _ := unix.Read(b.out, buf); n <= 0 {
			t.Fatal("no verdict")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}
