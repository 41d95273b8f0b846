package audit

import (
	"slices"
	"time"

	"portcullis/verdict"
)

// maxHeld is how many windows may be open at once: some 4 MiB. Beyond it records
// are written at once, each for itself.
const maxHeld = 8192

// repeats gathers the repeats of denied connections: SYNs tried again, datagrams
// sent again. The first one opens a window; the window's end, or that the same
// connection is denied for another cause, gives one entry about all of them.
type repeats struct {
	window time.Duration
	open   map[repeatKey]*heldEntry
	order  []*heldEntry // as they were opened; all windows are of one length
	held   uint64       // decisions in open windows
}

// repeatKey tells connections apart: five-tuple, ICMP type and code, and what is
// wrong with the packet. Packets without readable addresses are all one.
type repeatKey struct {
	flow   verdict.Flow
	reason verdict.Reason
}

type heldEntry struct {
	entry
	opened time.Time
	done   bool // written already; order still has it
}

func newRepeats(window time.Duration) *repeats {
	return &repeats{window: window, open: map[repeatKey]*heldEntry{}}
}

// add takes in a denial. emit is called, with what is complete, before it
// returns.
func (r *repeats) add(e *entry, now time.Time, emit func(*entry)) {
	if r.window <= 0 {
		emit(e)
		return
	}
	key := repeatKey{e.Flow, e.Decision.Reason}
	if h := r.open[key]; h != nil {
		if sameCause(&h.Decision, &e.Decision) && now.Before(h.opened.Add(r.window)) {
			// Workers of different queues may be out of order.
			h.Time, h.last = min(h.Time, e.Time), max(h.last, e.last)
			h.count += e.count
			r.held += e.count
			return
		}
		r.close(h, emit)
	}
	if len(r.open) >= maxHeld {
		emit(e)
		return
	}
	h := &heldEntry{entry: *e, opened: now}
	r.open[key] = h
	r.order = append(r.order, h)
	r.held += e.count
}

// sameCause tells whether the same pods were denied by the same policies.
func sameCause(a, b *verdict.Decision) bool {
	return samePod(a.Src, b.Src) && samePod(a.Dst, b.Dst) && sameSide(&a.Egress, &b.Egress) && sameSide(&a.Ingress, &b.Ingress)
}

func samePod(a, b *verdict.Endpoint) bool {
	return a == b || a != nil && b != nil && a.Meaning == b.Meaning && a.Namespace == b.Namespace && a.Name == b.Name
}

func sameSide(a, b *verdict.Side) bool {
	return a.Judged == b.Judged && a.Isolated == b.Isolated && a.Verdict == b.Verdict &&
		a.AllowedBy == b.AllowedBy && slices.Equal(a.Policies, b.Policies)
}

// close ends an entry's window.
func (r *repeats) close(h *heldEntry, emit func(*entry)) {
	delete(r.open, repeatKey{h.Flow, h.Decision.Reason})
	r.held -= h.count
	h.done = true
	emit(&h.entry)
	h.entry = entry{} // lets go of the snapshot
}

// expire ends the windows that are over.
func (r *repeats) expire(now time.Time, emit func(*entry)) {
	n := 0
	for _, h := range r.order {
		if !h.done && now.Before(h.opened.Add(r.window)) {
			break
		}
		if !h.done {
			r.close(h, emit)
		}
		n++
	}
	r.order = slices.Delete(r.order, 0, n)
}

// flush ends all windows.
func (r *repeats) flush(emit func(*entry)) {
	for _, h := range r.order {
		if !h.done {
			r.close(h, emit)
		}
	}
	r.order = nil
}
