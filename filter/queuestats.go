package filter

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"portcullis/verdict"
)

// latencyBounds are the upper bounds, inclusive, of the latency histogram's
// buckets; one more bucket takes what is slower.
var latencyBounds = [...]time.Duration{
	time.Microsecond, 2 * time.Microsecond, 5 * time.Microsecond,
	10 * time.Microsecond, 20 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 200 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond,
}

// LatencyBounds gives the upper bounds, inclusive, of the buckets of
// QueueStats.Latency.
func LatencyBounds() []time.Duration { return latencyBounds[:] }

// QueueStats are the counters of one queue since it was opened. Each is exact;
// together they may be a few packets apart.
type QueueStats struct {
	Queue uint16
	// Packets came from the kernel. Those without a decision are Unparsed or
	// Panics, and were dropped, or are held, or were and were returned: see Hold.
	Packets uint64
	// Decisions are indexed by verdict.Reason, then verdict.Verdict.
	Decisions [][2]uint64
	// Egress and Ingress are how each judged direction fell, by
	// verdict.Verdict.
	Egress, Ingress [2]uint64
	CacheHits       uint64
	Unparsed        uint64 // netlink messages that made no sense
	Panics          uint64
	ReadErrors      uint64
	VerdictErrors   uint64 // verdicts that couldn't be written or that the kernel refused
	// Latency counts decisions by the time from the return of the read that
	// brought the packet to just before the write of its verdict; the last
	// bucket is what LatencyBounds doesn't reach. LatencySum is their total.
	Latency    []uint64
	LatencySum time.Duration
	// Waiting packets have no verdict yet. KernelDropped were more than the
	// queue may hold, UserDropped more than the socket's receive buffer; with
	// fail-open these were accepted. They are the kernel's figures.
	Waiting, KernelDropped, UserDropped uint64
	Hold                                HoldStats
}

// Verdicts gives the number of decisions of a kind, over all reasons.
func (s *QueueStats) Verdicts(v verdict.Verdict) (n uint64) {
	for _, byVerdict := range s.Decisions {
		n += byVerdict[v]
	}
	return n
}

// counters are a worker's own; it alone adds, anybody may read.
type counters struct {
	packets, cacheHits, unparsed, panics atomic.Uint64
	readErrors, verdictErrors            atomic.Uint64
	reasons                              [][2]atomic.Uint64
	egress, ingress                      [2]atomic.Uint64
	latency                              [len(latencyBounds) + 1]atomic.Uint64
	latencySum                           atomic.Int64
	hold                                 holdCounters
}

// decided counts a decision.
func (c *counters) decided(d *verdict.Decision, latency time.Duration) {
	c.reasons[d.Reason][d.Verdict].Add(1)
	if d.Egress.Judged {
		c.egress[d.Egress.Verdict].Add(1)
	}
	if d.Ingress.Judged {
		c.ingress[d.Ingress.Verdict].Add(1)
	}
	if d.Cached {
		c.cacheHits.Add(1)
	}
	bucket := 0
	for bucket < len(latencyBounds) && latency > latencyBounds[bucket] {
		bucket++
	}
	c.latency[bucket].Add(1)
	c.latencySum.Add(int64(latency))
}

// stats reads the counters.
func (c *counters) stats(queue uint16) QueueStats {
	s := QueueStats{
		Queue:         queue,
		Packets:       c.packets.Load(),
		Decisions:     make([][2]uint64, len(c.reasons)),
		Egress:        load2(&c.egress),
		Ingress:       load2(&c.ingress),
		CacheHits:     c.cacheHits.Load(),
		Unparsed:      c.unparsed.Load(),
		Panics:        c.panics.Load(),
		ReadErrors:    c.readErrors.Load(),
		VerdictErrors: c.verdictErrors.Load(),
		Latency:       make([]uint64, len(c.latency)),
		LatencySum:    time.Duration(c.latencySum.Load()),
		Hold:          c.hold.stats(),
	}
	for i := range c.reasons {
		s.Decisions[i] = load2(&c.reasons[i])
	}
	for i := range c.latency {
		s.Latency[i] = c.latency[i].Load()
	}
	return s
}

func load2(c *[2]atomic.Uint64) [2]uint64 { return [2]uint64{c[0].Load(), c[1].Load()} }

// kernelTablePath is the kernel's list of bound queues in the network namespace
// of the thread that opens it (seq_show in nfnetlink_queue.c).
const kernelTablePath = "/proc/thread-self/net/netfilter/nfnetlink_queue"

// kernelTable is that list, kept open so that it stays with its namespace. It
// may be nil: figures of the kernel's are then missing, and nothing else is.
type kernelTable struct{ f *os.File }

// kernelRow is one bound queue.
type kernelRow struct {
	queue                         uint16
	owner                         uint32 // the netlink port that it is bound to
	waiting, dropped, userDropped uint64
}

func openKernelTable() *kernelTable {
	f, err := os.Open(kernelTablePath)
	if err != nil {
		return nil
	}
	return &kernelTable{f}
}

func (t *kernelTable) close() error {
	if t == nil {
		return nil
	}
	return t.f.Close()
}

// rows reads the list as it is now.
func (t *kernelTable) rows() []kernelRow {
	if t == nil {
		return nil
	}
	b, err := io.ReadAll(io.NewSectionReader(t.f, 0, 1<<20))
	if err != nil {
		return nil
	}
	return parseKernelTable(b)
}

// parseKernelTable reads lines of queue, owner, waiting, copy mode, copy range,
// dropped, dropped by the socket, last id, and a one.
func parseKernelTable(b []byte) (rows []kernelRow) {
	for line := range bytes.Lines(b) {
		var r kernelRow
		var mode, copyRange uint64
		n, _ := fmt.Sscan(string(line), &r.queue, &r.owner, &r.waiting, &mode, &copyRange, &r.dropped, &r.userDropped)
		if n == 7 {
			rows = append(rows, r)
		}
	}
	return rows
}

// queueOwner says which netlink port a queue is bound to, if to any.
func queueOwner(queue uint16) (owner uint32, ok bool) {
	b, err := os.ReadFile(kernelTablePath)
	if err != nil {
		return 0, false
	}
	for _, r := range parseKernelTable(b) {
		if r.queue == queue {
			return r.owner, true
		}
	}
	return 0, false
}
