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

// QueueStats are the counters of one queue since it was opened. Each is exact;
// together they may be a few packets apart.
type QueueStats struct {
	Queue uint16
	// Packets came from the kernel. Those without a decision are Unparsed or
	// Panics, and were dropped, or are held, or were and were returned: see Hold.
	Packets uint64
	// Decisions are indexed by verdict.Reason, then verdict.Verdict.
	Decisions [][verdict.VerdictCount]uint64
	// Egress and Ingress are how each judged direction fell, as Decisions is
	// indexed, with the decision's reason.
	Egress, Ingress [][verdict.VerdictCount]uint64
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
	// LatencyExponential counts the same by exponential buckets, see
	// ExponentialSchema.
	LatencyExponential []uint64
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

// byVerdict counts by verdict.Verdict.
type byVerdict [verdict.VerdictCount]atomic.Uint64

// counters are a worker's own; it alone adds, anybody may read.
type counters struct {
	packets, cacheHits, unparsed, panics atomic.Uint64
	readErrors, verdictErrors            atomic.Uint64
	reasons, egress, ingress             []byVerdict
	latency                              latencies
	hold                                 holdCounters
}

func newCounters() counters {
	n := len(verdict.Reasons())
	return counters{reasons: make([]byVerdict, n), egress: make([]byVerdict, n), ingress: make([]byVerdict, n)}
}

// decided counts a decision.
func (c *counters) decided(d *verdict.Decision, latency time.Duration) {
	c.reasons[d.Reason][d.Verdict].Add(1)
	if d.Egress.Judged {
		c.egress[d.Reason][d.Egress.Verdict].Add(1)
	}
	if d.Ingress.Judged {
		c.ingress[d.Reason][d.Ingress.Verdict].Add(1)
	}
	if d.Cached {
		c.cacheHits.Add(1)
	}
	c.latency.add(latency)
}

// stats reads the counters.
func (c *counters) stats(queue uint16) QueueStats {
	s := QueueStats{
		Queue:         queue,
		Packets:       c.packets.Load(),
		Decisions:     load(c.reasons),
		Egress:        load(c.egress),
		Ingress:       load(c.ingress),
		CacheHits:     c.cacheHits.Load(),
		Unparsed:      c.unparsed.Load(),
		Panics:        c.panics.Load(),
		ReadErrors:    c.readErrors.Load(),
		VerdictErrors: c.verdictErrors.Load(),
		LatencySum:    time.Duration(c.latency.sum.Load()),
		Hold:          c.hold.stats(),
	}
	for i := range c.latency.fixed {
		s.Latency = append(s.Latency, c.latency.fixed[i].Load())
	}
	for i := range c.latency.exponential {
		s.LatencyExponential = append(s.LatencyExponential, c.latency.exponential[i].Load())
	}
	return s
}

func load(c []byVerdict) [][verdict.VerdictCount]uint64 {
	all := make([][verdict.VerdictCount]uint64, len(c))
	for i := range c {
		all[i] = c[i].load()
	}
	return all
}

func (c *byVerdict) load() (counts [verdict.VerdictCount]uint64) {
	for v := range c {
		counts[v] = c[v].Load()
	}
	return counts
}

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
	mode, copyRange               uint64
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
		n, _ := fmt.Sscan(string(line), &r.queue, &r.owner, &r.waiting, &r.mode, &r.copyRange, &r.dropped, &r.userDropped)
		if n == 7 {
			rows = append(rows, r)
		}
	}
	return rows
}

// queueOwner says which netlink port a queue is bound to, if to any.
func queueOwner(queue uint16) (owner uint32, ok bool) {
	for _, r := range boundQueues() {
		if r.queue == queue {
			return r.owner, true
		}
	}
	return 0, false
}

// boundQueues lists the bound queues of the calling thread's network namespace:
// none where the kernel's list can't be read.
func boundQueues() []kernelRow {
	b, err := os.ReadFile(kernelTablePath)
	if err != nil {
		return nil
	}
	return parseKernelTable(b)
}
