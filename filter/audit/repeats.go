package audit

import (
	"slices"
	"time"

	"portcullis/verdict"
)

// maxHeld is how many windows may be open at once: some 8 MiB. Beyond it records
// are written at once, each for itself.
const maxHeld = 8192

// repeats gathers the repeats of denied connections: SYNs tried again, datagrams
// sent again. The first one opens a window; the window's end, or that the same
// connection is denied for another cause, gives one line about all of them.
type repeats struct {
	window time.Duration
	render func(*Record) []byte // good until the next call
	emit   func([]byte, tally)
	open   map[repeatKey]*held
	order  []*held // as they were opened; all windows are of one length
	held   uint64  // decisions in open windows
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
	key    repeatKey
	cause  cause
	line   []byte
	opened time.Time
	done   bool // written already; order still has it
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
		a.AllowedBy == b.AllowedBy && slices.Equal(a.Policies, b.Policies)
}

func newRepeats(window time.Duration, render func(*Record) []byte, emit func([]byte, tally)) *repeats {
	return &repeats{window: window, render: render, emit: emit, open: map[repeatKey]*held{}}
}

// add takes in a denial. What is complete by it is emitted before it returns.
func (r *repeats) add(rec *Record, now time.Time) {
	if r.window <= 0 {
		r.emit(r.render(rec), tally{count: 1})
		return
	}
	key, cause := repeatKey{rec.Flow, rec.Decision.Reason}, causeOf(&rec.Decision)
	if h := r.open[key]; h != nil {
		if h.cause.equal(&cause) && now.Before(h.opened.Add(r.window)) {
			h.count++
			h.last = max(h.last, rec.Time)
			r.held++
			return
		}
		r.close(h)
	}
	if len(r.open) >= maxHeld {
		r.emit(r.render(rec), tally{count: 1})
		return
	}
	h := &held{tally: tally{count: 1, last: rec.Time}, key: key, cause: cause, line: slices.Clone(r.render(rec)), opened: now}
	r.open[key] = h
	r.order = append(r.order, h)
	r.held++
}

// close ends a window.
func (r *repeats) close(h *held) {
	delete(r.open, h.key)
	r.held -= h.count
	r.emit(h.line, h.tally)
	*h = held{opened: h.opened, done: true}
}

// expire ends the windows that are over.
func (r *repeats) expire(now time.Time) {
	n := 0
	for _, h := range r.order {
		if !h.done && now.Before(h.opened.Add(r.window)) {
			break
		}
		if !h.done {
			r.close(h)
		}
		n++
	}
	r.order = slices.Delete(r.order, 0, n)
}

// flush ends all windows.
func (r *repeats) flush() {
	for _, h := range r.order {
		if !h.done {
			r.close(h)
		}
	}
	r.order = nil
}
