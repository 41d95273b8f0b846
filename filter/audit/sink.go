package audit

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sinkBuffer is how many bytes of lines wait for a sink that is slow, the
	// ones that it is being given included: some ten thousand lines.
	sinkBuffer = 8 << 20
	// tellEvery is how often a sink is told how much is missing from it.
	tellEvery = time.Second
	// tornEnd ends what is left of a line that wasn't written whole.
	tornEnd = "~\n"
)

// missing is what a log lacks.
type missing struct {
	suppressed uint64 // more than the rate allows
	lost       uint64 // decisions
	unseen     uint64 // connections that the recorder wasn't told of
}

func (m missing) minus(other missing) missing {
	return missing{m.suppressed - other.suppressed, m.lost - other.lost, m.unseen - other.unseen}
}

// batch is some lines, and of how many decisions each one tells. It is shared by
// the sinks and never changed once handed over.
type batch struct {
	lines  []byte
	counts []uint64
}

// decisions sums the counts.
func (b batch) decisions() (n uint64) {
	for _, c := range b.counts {
		n += c
	}
	return n
}

// sink writes batches from a goroutine of its own, so that one that is slow or
// stuck holds up neither the log nor the other sinks.
type sink struct {
	name    string
	w       io.Writer
	node    string
	missing func() missing // before any sink

	mu        sync.Mutex
	queue     []batch
	size      int // bytes in queue, and in the batch that is being written
	writing   uint64
	abandoned bool

	wake    chan struct{}
	stop    chan struct{}
	stopped chan struct{}

	// What follows belongs to the sink's goroutine.
	torn bool // the last write ended inside a line
	told missing

	written, lost, failures atomic.Uint64
}

func newSink(s Sink, node string, missing func() missing) *sink {
	n := &sink{name: s.Name, w: s.W, node: node, missing: missing,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), stopped: make(chan struct{})}
	go n.run()
	return n
}

func (s *sink) stats() SinkStats {
	return SinkStats{Name: s.name, Written: s.written.Load(), Lost: s.lost.Load(), Failures: s.failures.Load()}
}

// offer hands a batch over and returns at once. What doesn't fit is lost.
func (s *sink) offer(b batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abandoned || s.size > 0 && s.size+len(b.lines) > sinkBuffer {
		s.lost.Add(b.decisions())
		return
	}
	s.queue = append(s.queue, b)
	s.size += len(b.lines)
	select {
	case s.wake <- struct{}{}:
	default: // it is awake
	}
}

// abandon gives up on a sink that takes nothing: what waits for it, and what it
// is at, is lost. It is false if there was nothing to give up.
func (s *sink) abandon() bool {
	select {
	case <-s.stopped:
		return false
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abandoned {
		return true
	}
	s.abandoned = true
	s.lost.Add(s.writing)
	for _, b := range s.queue {
		s.lost.Add(b.decisions())
	}
	s.queue = nil
	return true
}

// run writes what is offered until stop, and then what is left.
func (s *sink) run() {
	defer close(s.stopped)
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.wake:
			s.writeAll()
		case <-tick.C:
			s.tellMissing()
		case <-s.stop:
			s.writeAll()
			s.tellMissing()
			return
		}
	}
}

// next takes the oldest batch.
func (s *sink) next() (batch, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return batch{}, false
	}
	b := s.queue[0]
	s.queue[0] = batch{}
	s.queue = s.queue[1:]
	s.writing = b.decisions()
	return b, true
}

func (s *sink) writeAll() {
	for b, ok := s.next(); ok; b, ok = s.next() {
		whole := s.write(b.lines)
		s.mu.Lock()
		if !s.abandoned { // else it counts as lost already
			done := batch{counts: b.counts[:whole]}.decisions()
			s.written.Add(done)
			s.lost.Add(s.writing - done)
		}
		s.writing = 0
		s.size -= len(b.lines)
		s.mu.Unlock()
	}
}

// write gives lines to the writer and says how many it took whole. Those that it
// refuses aren't tried again: what comes after them is worth as much.
func (s *sink) write(lines []byte) (whole int) {
	var n int
	var err error
	if s.torn {
		// What a failed write left of a line must not spoil the next one, nor
		// pass for a whole line if only its end was missing: it counts as lost.
		n, err = s.w.Write([]byte(tornEnd))
		s.torn = n != len(tornEnd)
		n = 0
	}
	if !s.torn {
		n, err = s.w.Write(lines)
		n = min(max(n, 0), len(lines))
	}
	if err != nil || n < len(lines) {
		if n > 0 {
			s.torn = lines[n-1] != '\n'
		}
		if s.failures.Add(1) == 1 {
			slog.Error("decision log: can't write, decisions are being lost; said once, see the metrics", "sink", s.name, "error", err)
		}
	}
	return bytes.Count(lines[:n], []byte{'\n'})
}

// tellMissing writes how many decisions are missing from this sink since it last
// said so, if any are. What it can't write is told the next time.
func (s *sink) tellMissing() {
	now := s.missing()
	now.lost += s.lost.Load()
	if now == s.told {
		return
	}
	line := appendMissing(nil, s.node, time.Now(), now.minus(s.told))
	if s.write(line) == 1 {
		s.told = now
	}
}
