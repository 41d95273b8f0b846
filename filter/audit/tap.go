package audit

import (
	"context"
	"sync"
	"time"
)

const (
	// tapLines is how many of the last decisions are kept for those who look later:
	// some 1.5 MiB of lines.
	tapLines = 2048
	// tapBuffer is how many bytes of lines wait for a subscriber that is slow.
	tapBuffer = 1 << 20
)

// Tap is where people look at decisions while they are made: each one at once,
// whatever the log selects, samples, gathers or suppresses. It keeps the last
// ones, counts who is denied, and hands a copy to each subscriber. A subscriber
// that is slow loses lines, and nobody else notices it. The nil Tap is one
// that nobody can look at.
type Tap struct {
	mu          sync.Mutex
	lines       [tapLines][]byte // a ring; lines keep their memory
	next        int              // where the next line goes
	lost        uint64           // how many never came: their rings were full
	denials     *denials
	subscribers map[*Subscriber]bool
}

// NewTap makes a tap, for Config.Tap.
func NewTap() *Tap {
	return &Tap{denials: newDenials(), subscribers: map[*Subscriber]bool{}}
}

// put takes in a decision and its line, which stays the caller's.
func (t *Tap) put(rec *Record, line []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines[t.next] = append(t.lines[t.next][:0], line...)
	t.next = (t.next + 1) % tapLines
	t.denials.add(rec)
	for s := range t.subscribers {
		s.offer(line)
	}
}

// missed notes how many decisions so far found a ring full, and tells the
// subscribers.
func (t *Tap) missed(lost uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if lost == t.lost {
		return
	}
	for s := range t.subscribers {
		s.miss(lost - t.lost)
	}
	t.lost = lost
}

// Denied lists who was denied since the agent's start, the most often first.
func (t *Tap) Denied() []Denied {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.denials.list()
}

// Last gives the lines of the last decisions, the oldest first, and with follow a
// subscriber who gets all that come after them: close it.
func (t *Tap) Last(follow bool) (lines [][]byte, s *Subscriber) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range tapLines {
		if line := t.lines[(t.next+i)%tapLines]; len(line) > 0 {
			lines = append(lines, append([]byte(nil), line...))
		}
	}
	if follow {
		s = &Subscriber{tap: t, wake: make(chan struct{}, 1)}
		t.subscribers[s] = true
	}
	return lines, s
}

// Subscriber gets decisions as they are made.
type Subscriber struct {
	tap  *Tap
	wake chan struct{}

	mu    sync.Mutex
	queue []byte
	lost  uint64
}

// offer appends a line, or counts it as lost if too much waits already.
func (s *Subscriber) offer(line []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue)+len(line) > tapBuffer {
		s.lost++
	} else {
		s.queue = append(s.queue, line...)
	}
	s.rouse()
}

// miss counts decisions that nobody was offered.
func (s *Subscriber) miss(lost uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost += lost
	s.rouse()
}

func (s *Subscriber) rouse() {
	select {
	case s.wake <- struct{}{}:
	default: // it is awake
	}
}

// Next waits for lines and gives all that have come since it was last called, and
// how many were lost. The lines are the caller's.
func (s *Subscriber) Next(ctx context.Context) (lines []byte, lost uint64, err error) {
	for {
		s.mu.Lock()
		lines, lost = s.queue, s.lost
		s.queue, s.lost = nil, 0
		s.mu.Unlock()
		if len(lines) > 0 || lost > 0 {
			return lines, lost, nil
		}
		select {
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case <-s.wake:
		}
	}
}

// Close ends the subscription.
func (s *Subscriber) Close() {
	s.tap.mu.Lock()
	defer s.tap.mu.Unlock()
	delete(s.tap.subscribers, s)
}

// MissingLine is the line that tells a subscriber how many decisions it lost.
func MissingLine(node string, now time.Time, lost uint64) []byte {
	return appendMissing(nil, node, now, missing{lost: lost})
}
