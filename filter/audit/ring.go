package audit

import (
	"sync/atomic"

	"portcullis/verdict"
)

// Record is one decision on its way to the log. It has a fixed size and holds
// on to the snapshot that made the decision until it is written.
type Record struct {
	Time     int64 // when the packet was received, in nanoseconds since 1970
	Latency  int64 // from receiving the packet to its verdict, in nanoseconds
	Flow     verdict.Flow
	Decision verdict.Decision
	Snapshot *verdict.Snapshot // by which it was decided; nil before the first
	// Observed says that the connection wasn't queued, and needn't have been:
	// conntrack told of it.
	Observed bool
	// Revoked says that the decision is about a connection that was open, and is
	// cut by it: Time is when.
	Revoked bool
}

// refresh names the ends as the decision's snapshot has them: a cached decision
// names them as the snapshot had them that first made it. The pods are the same,
// but what the log alone looks at may have changed.
func (r *Record) refresh() {
	if r.Snapshot != nil {
		r.Decision.Src, r.Decision.Dst = r.Snapshot.Endpoint(r.Flow.Src), r.Snapshot.Endpoint(r.Flow.Dst)
	}
}

// Ring carries records from one worker to the log: bounded, without locks, for
// exactly one goroutine that puts and one that takes. It never blocks the
// worker; what doesn't fit is counted and gone.
type Ring struct {
	slots  []Record
	mask   uint64
	atOnce int // how many the log takes at a time

	// Each side writes to one cache line of its own, so that the worker isn't
	// slowed by the log's progress. Positions only grow; a slot's index is the
	// position modulo the size.
	_    [64]byte
	head atomic.Uint64 // next to put; the worker's
	seen uint64        // tail as the worker last looked; the worker's
	lost atomic.Uint64
	_    [64]byte
	tail atomic.Uint64 // next to take; the log's
	_    [64]byte
}

// newRing makes a ring for at least size records, rounded up to a power of two.
func newRing(size int) *Ring {
	n := 1
	for n < size {
		n *= 2
	}
	return &Ring{slots: make([]Record, n), mask: uint64(n - 1), atOnce: n}
}

// Put copies a record into the ring and returns at once, without allocating.
// It is false, and the record is counted as lost, if the ring is full. A nil
// ring is that of a log that is off: it swallows everything and loses nothing.
func (r *Ring) Put(rec *Record) bool {
	if r == nil {
		return true
	}
	head := r.head.Load()
	if head-r.seen >= uint64(len(r.slots)) {
		if r.seen = r.tail.Load(); head-r.seen >= uint64(len(r.slots)) {
			r.lost.Add(1)
			return false
		}
	}
	r.slots[head&r.mask] = *rec
	r.head.Store(head + 1)
	return true
}

// Lost says how many records found the ring full.
func (r *Ring) Lost() uint64 {
	if r == nil {
		return 0
	}
	return r.lost.Load()
}

// take hands the oldest record to use, if there is one. The slot is emptied, so
// that an idle ring keeps no old snapshot alive.
func (r *Ring) take(use func(*Record)) bool {
	tail := r.tail.Load()
	if tail == r.head.Load() {
		return false
	}
	slot := &r.slots[tail&r.mask]
	use(slot)
	*slot = Record{}
	r.tail.Store(tail + 1)
	return true
}
