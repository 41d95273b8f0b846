//go:build soak

package soak

import (
	"sync"
	"time"
)

// window is how long a change may take to be in force.
const window = time.Second

// history knows which states may have been in force when: a state from when its
// writing began until a window after the next one's was done.
type history struct {
	mu     sync.Mutex
	states []entry
	down   []span // nobody judges: what is allowed may have to wait
	broken []span // others have taken the gate away: what is denied may get by
}

type entry struct {
	state
	span
}

// span is a time; a zero until is not over.
type span struct{ from, until time.Time }

func (s span) overlaps(from, until time.Time) bool {
	return !s.from.After(until) && (s.until.IsZero() || !s.until.Before(from))
}

// change writes the next state, during which both it and the last may be in force.
func (h *history) change(next state, write func()) {
	h.mu.Lock()
	h.states = append(h.states, entry{next, span{from: time.Now()}})
	last := len(h.states) - 1
	h.mu.Unlock()
	write()
	h.mu.Lock()
	defer h.mu.Unlock()
	if last > 0 {
		h.states[last-1].until = time.Now().Add(window)
	}
	for len(h.states) > 2 && h.states[0].until.Before(time.Now().Add(-time.Minute)) {
		h.states = h.states[1:]
		last--
	}
}

// during notes a time in which something else holds, until a window after it.
func (h *history) during(list *[]span, what func()) {
	h.mu.Lock()
	*list = append(*list, span{from: time.Now()})
	last := len(*list) - 1
	h.mu.Unlock()
	what()
	h.mu.Lock()
	defer h.mu.Unlock()
	(*list)[last].until = time.Now().Add(window)
}

func (h *history) now() state {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.states[len(h.states)-1].state
}

// expected says what a connection between two slots must have met between two
// moments: yes and no are whether it may have been allowed and denied. Neither means
// that nobody can say, since one of its ends was coming or going.
func (h *history) expected(from, to pod, slots [2]int, at port, began, ended time.Time) (yes, no bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.states {
		if !e.overlaps(began, ended) {
			continue
		}
		// Labels may have changed meanwhile, but each must be the same pod.
		f, ok1 := e.pods[slots[0]]
		t, ok2 := e.pods[slots[1]]
		if !ok1 || !ok2 || f.key() != from.key() || t.key() != to.key() {
			return false, false
		}
		if e.allows(f, t, at) {
			yes = true
		} else {
			no = true
		}
	}
	for _, s := range h.down {
		no = no || s.overlaps(began, ended)
	}
	for _, s := range h.broken {
		yes = yes || s.overlaps(began, ended)
	}
	return yes, no
}
