package verdict

import (
	"hash/maphash"
	"math/bits"
)

// flowKey is what a verdict depends on: both addresses, the protocol and the
// destination port. The source port is left out, since no policy can see it,
// so that a client's second connection finds the verdict of its first.
type flowKey struct {
	src, dst  addrKey
	protoPort uint64
}

func flowKeyOf(f *Flow) flowKey {
	return flowKey{keyOf(f.Src), keyOf(f.Dst), uint64(f.Proto)<<16 | uint64(f.DstPort)}
}

// hash mixes the key by multiplying, as wyhash does. The seed keeps others from
// choosing flows that meet in one set; if they did, they would make each other
// miss, and nothing worse.
func (k *flowKey) hash(seed uint64) uint64 {
	src := mix(k.src.hi^seed, k.src.lo^0xa0761d6478bd642f)
	dst := mix(k.dst.hi^seed, k.dst.lo^0xe7037ed1a0b428db)
	return mix(src^k.protoPort, dst^0x8ebc6af09c88c6e3)
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// flowEntry is a cached decision and what must still be true of it.
type flowEntry struct {
	key        flowKey
	decision   Decision
	generation uint64  // of the snapshot that it was last known good for
	src, dst   uint64  // the stamps of both addresses then
	_          [8]byte // two cache lines
}

// cacheWays is how many flows may have the same set: the hash chooses the set,
// and use decides who of a set has to go.
const cacheWays = 8

// cacheSet tells of the entries of one set, in one cache line: a part of each
// one's hash, never 0 for one in use, and when it was last used.
type cacheSet struct {
	tags, used [cacheWays]uint32
}

// flowCache remembers decisions, the least recently used of a set giving way. A
// new flow counts as used when the one was that it takes the place of, until it
// is used again: so a port scan, all of whose flows are new, takes one entry of
// each set and leaves the others, and the processor's caches, to those that come
// back. All is there from the start: to take an entry over allocates nothing.
type flowCache struct {
	sets    []cacheSet
	entries []flowEntry // those of a set side by side
	ways    int
	clock   uint32
	seed    uint64
}

// newFlowCache makes a cache of up to size flows, at least one.
func newFlowCache(size int) *flowCache {
	ways := min(size, cacheWays)
	sets := size / ways
	return &flowCache{
		sets:    make([]cacheSet, sets),
		entries: make([]flowEntry, sets*ways),
		ways:    ways,
		seed:    maphash.String(maphash.MakeSeed(), ""),
	}
}

// find gives the flow's entry, and whether it is the flow's already, which then
// counts as used, or is one that it takes over.
func (c *flowCache) find(key *flowKey) (e *flowEntry, found bool) {
	hash := key.hash(c.seed)
	at, _ := bits.Mul64(hash, uint64(len(c.sets)))
	set, first := &c.sets[at], int(at)*c.ways
	tag := uint32(hash) | 1
	c.clock++
	oldest, age := 0, uint32(0)
	for i := range c.ways {
		if set.tags[i] == tag {
			if e := &c.entries[first+i]; e.key == *key {
				set.used[i] = c.clock
				return e, true
			}
		}
		if a := c.clock - set.used[i]; a > age {
			oldest, age = i, a
		}
	}
	set.tags[oldest], set.used[oldest] = tag, max(set.used[oldest], 1)
	e = &c.entries[first+oldest]
	e.key = *key
	return e, false
}
