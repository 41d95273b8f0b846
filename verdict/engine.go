package verdict

import "sync/atomic"

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

// Worker decides for one queue, with a flow cache of its own. It belongs to one
// goroutine.
type Worker struct {
	engine *Engine
	cache  *flowCache // nil for none
	bare   Decision   // the decision of flows that aren't cached
	last   *Snapshot
}

// NewWorker makes a worker that caches up to cacheSize flows; zero or less
// means none.
func (e *Engine) NewWorker(cacheSize int) *Worker {
	w := &Worker{engine: e}
	if cacheSize > 0 {
		w.cache = newFlowCache(cacheSize)
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
	key := flowKeyOf(f)
	// What a cached verdict doesn't depend on by its key isn't cached.
	if w.cache == nil || f.Defect != ReasonNone || isNeighbourDiscovery(f) {
		w.bare = Decision{}
		s.decide(f, &key, &w.bare)
		s.noteUnknown(f, &key, &w.bare)
		return &w.bare
	}
	e, found := w.cache.find(&key)
	if found && (e.generation == s.generation || e.stillGood(s)) {
		e.decision.Cached = true
		return &e.decision
	}
	e.fill(s, f)
	return &e.decision
}

// Snapshot gives the snapshot that the last Decide went by, nil if there was none.
// A cached decision may have been made by an earlier one and holds in this one
// too.
func (w *Worker) Snapshot() *Snapshot { return w.last }

// fill decides the flow and notes what the decision depends on.
func (e *flowEntry) fill(s *Snapshot, f *Flow) {
	e.decision = Decision{}
	s.decide(f, &e.key, &e.decision)
	s.noteUnknown(f, &e.key, &e.decision)
	e.generation = s.generation
	e.src, e.dst = s.stamps[e.key.src.stampSlot()], s.stamps[e.key.dst.stampSlot()]
}

// stillGood tells whether an entry from an earlier snapshot holds in this one:
// nothing that concerns either address has changed since. A verdict depends on
// its two ends alone: what selects or admits an end is part of its meaning.
func (e *flowEntry) stillGood(s *Snapshot) bool {
	if e.src != s.stamps[e.key.src.stampSlot()] || e.dst != s.stamps[e.key.dst.stampSlot()] {
		return false
	}
	e.generation = s.generation
	return true
}
