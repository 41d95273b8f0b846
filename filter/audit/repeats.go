package audit

import (
	"slices"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"portcullis/verdict"
)

// maxHeld is how many windows may be open at once: some 8 MiB. Beyond it the oldest
// one ends early.
const maxHeld = 8192

// repeats gathers the repeats of denied connections: SYNs tried again, datagrams
// sent again. The first one opens a window; the window's end, or that the same
// connection is denied for another cause, gives one line about all of them.
type repeats struct {
	window time.Duration
	render func(*Record) []byte // good until the next call
	emit   func([]byte, tally)
	// open has the windows in the order in which they were opened, since it is only
	// peeked into; all windows are of one length. Who leaves it is emitted.
	open *simplelru.LRU[repeatKey, *held]
	held uint64 // decisions in open windows
}

// repeatKey tells connections apart: five-tuple, ICMP type and code, and what is
// wrong with the packet. Packets without readable addresses are all one.
type repeatKey struct {
	flow   verdict.Flow
	reason verdict.Reason
}

// held is an open window. It has its line at once, so that it doesn't hold on to
// the snapshot that it tells of: in a busy cluster there are many in ten seconds.
type held struct {
	tally
	cause  cause
	line   []byte
	opened time.Time
}

// cause is which pods were denied by which policies.
type cause struct {
	src, dst        podID
	egress, ingress verdict.Side
}

type podID struct {
	namespace, name string
	meaning         uint64
}

func causeOf(d *verdict.Decision) cause {
	return cause{idOf(d.Src), idOf(d.Dst), d.Egress, d.Ingress}
}

func idOf(pod *verdict.Endpoint) podID {
	if pod == nil {
		return podID{}
	}
	return podID{pod.Namespace, pod.Name, pod.Meaning}
}

func (c *cause) equal(other *cause) bool {
	return c.src == other.src && c.dst == other.dst && sameSide(&c.egress, &other.egress) && sameSide(&c.ingress, &other.ingress)
}

func sameSide(a, b *verdict.Side) bool {
	return a.Judged == b.Judged && a.Isolated == b.Isolated && a.Verdict == b.Verdict &&
		a.AllowedBy() == b.AllowedBy() && slices.Equal(a.Policies(), b.Policies())
}

func newRepeats(window time.Duration, render func(*Record) []byte, emit func([]byte, tally)) *repeats {
	r := &repeats{window: window, render: render, emit: emit}
	var err error
	r.open, err = simplelru.NewLRU(maxHeld, r.ended)
	if err != nil {
		panic(err) // of a size below one alone
	}
	return r
}

// add takes in a denial, and tells whether it is none of those repeated. What is
// complete by it is emitted before it returns.
func (r *repeats) add(rec *Record, now time.Time) (first bool) {
	if r.window <= 0 {
		r.emit(r.render(rec), tally{count: 1})
		return true
	}
	key, cause := repeatKey{rec.Flow, rec.Decision.Reason}, causeOf(&rec.Decision)
	if h, ok := r.open.Peek(key); ok {
		if h.cause.equal(&cause) && now.Before(h.opened.Add(r.window)) {
			h.count++
			h.last = max(h.last, rec.Time)
			r.held++
			return false
		}
		r.open.Remove(key)
	}
	r.held++
	r.open.Add(key, &held{tally: tally{count: 1, last: rec.Time}, cause: cause, line: slices.Clone(r.render(rec)), opened: now})
	return true
}

// ended emits a window that leaves the open ones.
func (r *repeats) ended(_ repeatKey, h *held) {
	r.held -= h.count
	r.emit(h.line, h.tally)
}

// expire ends the windows that are over.
func (r *repeats) expire(now time.Time) {
	for {
		_, h, ok := r.open.GetOldest()
		if !ok || now.Before(h.opened.Add(r.window)) {
			return
		}
		r.open.RemoveOldest()
	}
}

// flush ends all windows, the oldest first.
func (r *repeats) flush() {
	for r.open.Len() > 0 {
		r.open.RemoveOldest()
	}
}
