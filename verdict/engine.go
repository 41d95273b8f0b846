package verdict

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// Engine holds the snapshot in force. Swap and Snapshot may be called from any
// goroutine at any time.
type Engine struct {
	snapshot atomic.Pointer[Snapshot]
}

// NewEngine makes an engine without a snapshot: until the first Swap it denies
// everything.
func NewEngine() *Engine { return new(Engine) }

// Swap puts a snapshot in force. Decisions that begin after Swap returns are
// made by it, cached ones included. The snapshots of one engine must follow each
// other, as NewSnapshot's prev says, with growing generations: that is how
// workers tell what they may still use.
func (e *Engine) Swap(s *Snapshot) { e.snapshot.Store(s) }

// Snapshot gives the snapshot in force, nil before the first Swap.
func (e *Engine) Snapshot() *Snapshot { return e.snapshot.Load() }

// flowKey is what a verdict depends on: both addresses, the protocol and the
// destination port. The source port is left out, since no policy can see it,
// so that a client's second connection finds the verdict of its first.
type flowKey struct {
	srcHi, srcLo, dstHi, dstLo, protoPort uint64
}

// flowEntry is a cached decision and what must still be true of it.
type flowEntry struct {
	key        flowKey
	decision   Decision
	generation uint64 // of the snapshot that it was last known good for
	src, dst   uint64 // the stamps of both addresses then
}

// Worker decides for one queue, with a flow cache of its own. It belongs to one
// goroutine.
//
// simplelru allocates a list node for each new key, which a port scan would
// turn into garbage on the packet path. So the LRU orders a fixed pool of
// slots instead, all there from the start, and a map finds a flow's slot: a
// miss takes the oldest slot over and allocates nothing.
type Worker struct {
	engine *Engine
	slots  []flowEntry
	order  *simplelru.LRU[uint32, *flowEntry]
	index  map[flowKey]uint32
	bare   Decision // the decision of flows that aren't cached
	last   *Snapshot
}

// NewWorker makes a worker that caches up to cacheSize flows; zero or less
// means none.
func (e *Engine) NewWorker(cacheSize int) *Worker {
	w := &Worker{engine: e}
	if cacheSize <= 0 {
		return w
	}
	w.slots = make([]flowEntry, cacheSize)
	// The error is about sizes below one only.
	w.order, _ = simplelru.NewLRU[uint32, *flowEntry](cacheSize, nil)
	// Room for twice the flows keeps the map from growing when keys replace
	// each other.
	w.index = make(map[flowKey]uint32, 2*cacheSize)
	for i := range w.slots {
		w.order.Add(uint32(i), &w.slots[i])
	}
	return w
}

// Decide judges a flow by the snapshot in force. The decision is the worker's
// own and is good until its next Decide. It allocates nothing.
func (w *Worker) Decide(f *Flow) *Decision {
	s := w.engine.snapshot.Load()
	w.last = s
	if s == nil {
		w.bare = Decision{Reason: ReasonNotReady}
		return &w.bare
	}
	// What a cached verdict doesn't depend on by its key isn't cached.
	if w.order == nil || f.Defect != ReasonNone || isNeighbourDiscovery(f) {
		w.bare = Decision{}
		s.decide(f, &w.bare)
		return &w.bare
	}
	key := keyOf(f)
	slot, ok := w.index[key]
	if !ok {
		return w.miss(s, f, key)
	}
	e, _ := w.order.Get(slot)
	if e.generation == s.generation || w.stillGood(s, e) {
		e.decision.Cached = true
		return &e.decision
	}
	w.fill(s, f, e)
	return &e.decision
}

// Snapshot gives the snapshot that the last Decide went by, nil if there was none.
// A cached decision may have been made by an earlier one and holds in this one
// too.
func (w *Worker) Snapshot() *Snapshot { return w.last }

// miss decides a flow that isn't cached, and gives it the oldest slot.
func (w *Worker) miss(s *Snapshot, f *Flow, key flowKey) *Decision {
	slot, e, _ := w.order.GetOldest()
	if at, ok := w.index[e.key]; ok && at == slot {
		delete(w.index, e.key)
	}
	w.order.Get(slot) // now the youngest
	w.index[key] = slot
	e.key = key
	w.fill(s, f, e)
	return &e.decision
}

// fill decides the flow and notes what the decision depends on.
func (w *Worker) fill(s *Snapshot, f *Flow, e *flowEntry) {
	e.decision = Decision{}
	s.decide(f, &e.decision)
	e.generation = s.generation
	e.src = s.stamps[slotOf(e.key.srcHi, e.key.srcLo)]
	e.dst = s.stamps[slotOf(e.key.dstHi, e.key.dstLo)]
}

// stillGood tells whether an entry from an earlier snapshot holds in this one:
// nothing that concerns either address has changed since. A verdict depends on
// its two ends alone: what selects or admits an end is part of its meaning.
func (w *Worker) stillGood(s *Snapshot, e *flowEntry) bool {
	if e.src != s.stamps[slotOf(e.key.srcHi, e.key.srcLo)] || e.dst != s.stamps[slotOf(e.key.dstHi, e.key.dstLo)] {
		return false
	}
	e.generation = s.generation
	return true
}

func keyOf(f *Flow) flowKey {
	var k flowKey
	k.srcHi, k.srcLo = halves(f.Src)
	k.dstHi, k.dstLo = halves(f.Dst)
	k.protoPort = uint64(f.Proto)<<16 | uint64(f.DstPort)
	return k
}

// halves splits an address into two numbers; the zero Addr and the IPv6
// unspecified address are alike, and neither is ever a pod's.
func halves(a netip.Addr) (hi, lo uint64) {
	if !a.IsValid() {
		return 0, 0
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}
