package e2e

import (
	"sync"
	"time"
)

// stalls tells how long this machine has kept the tests from running. What is promised
// within a second can't be held against an agent that shares two processors with a
// compiler: such limits are moved by it. On a machine with nothing else to do it is zero.
var stalls stallClock

// stallClock looks at the time at every tick.
type stallClock struct {
	mu   sync.Mutex
	list []stall
	once sync.Once
}

// stall is a tick that came late.
type stall struct {
	end time.Time
	by  time.Duration
}

const (
	stallTick = 5 * time.Millisecond
	// stallLeast is what a timer is late by where others run as well.
	stallLeast = 10 * time.Millisecond
)

func (s *stallClock) start() {
	s.once.Do(func() {
		go func() {
			for last := time.Now(); ; {
				time.Sleep(stallTick)
				now := time.Now()
				if late := now.Sub(last) - stallTick; late > stallLeast {
					s.mu.Lock()
					s.list = append(s.list, stall{now, late})
					s.mu.Unlock()
				}
				last = now
			}
		}()
	})
}

// since sums the stalls that have ended since then.
func (s *stallClock) since(t time.Time) (sum time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.list) - 1; i >= 0 && s.list[i].end.After(t); i-- {
		sum += s.list[i].by
	}
	return sum
}

// after waits until so much time has passed since then, and all stalls since then
// besides; it gives the moment. It waits for no longer than twice as long and patience.
func (s *stallClock) after(t time.Time, wait time.Duration) time.Time {
	for end := t.Add(2*wait + patient); ; {
		due := t.Add(wait + s.since(t))
		if due.After(end) {
			due = end
		}
		left := time.Until(due)
		if left <= 0 {
			return due
		}
		time.Sleep(left)
	}
}
