package main

import (
	"os"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
)

// The memory that the agent may fill with garbage before Go collects it. Go's own
// measure is as much as all that is in use, which doubles the resident memory of a
// large cluster's agent; and next to nothing where little is in use, where the decision
// log would have it collect all the time. Packets make no garbage, changes and records
// do.
const (
	leastRoom = 12 << 20
	roomShare = 4 // at least a fourth of what is in use
	// loadPercent is GOGC while the first state is read. What is kept of it stands where
	// there was room between what wasn't, for good: the less garbage there is at a time,
	// the closer.
	loadPercent = 20
)

// gcPercent is GOGC for a heap with so many bytes in use.
func gcPercent(live uint64) int {
	room := max(leastRoom, live/roomShare)
	return int(100 * room / max(live, 1<<20))
}

// loadTightly sets Go's collector for the time in which the first state is read.
// Whoever sets GOGC knows better.
func loadTightly() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(loadPercent)
	}
}

// boundGarbage gives back to the system what reading the first state has left behind,
// several times what is kept of it, and then sets the collector anew after each
// collection, by what it has found in use, unless GOGC is set.
func boundGarbage() {
	debug.FreeOSMemory()
	if os.Getenv("GOGC") != "" {
		return
	}
	last := 0
	set := func() {
		if p := gcPercent(liveHeap()); p < last*9/10 || p > last*11/10 { // each call stops the world for a moment
			debug.SetGCPercent(p)
			last = p
		}
	}
	set()
	runtime.SetFinalizer(&collected{}, func(c *collected) { c.again(set) })
}

// collected is an object that nothing refers to, so that its finalizer tells that
// garbage has been collected.
type collected struct{ _ [16]byte }

func (c *collected) again(set func()) {
	set()
	runtime.SetFinalizer(c, func(c *collected) { c.again(set) })
}

// liveHeap gives how many bytes the last collection found in use.
func liveHeap() uint64 {
	sample := []runtimemetrics.Sample{{Name: "/gc/heap/live:bytes"}}
	runtimemetrics.Read(sample)
	if sample[0].Value.Kind() != runtimemetrics.KindUint64 {
		return 0
	}
	return sample[0].Value.Uint64()
}
