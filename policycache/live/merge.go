package live

import (
	"slices"
	"time"
)

// Merge makes one stream of several nodes' records, in the order of their times as
// far as they come within hold of each other. Its zero value hands everything on
// as it comes. It belongs to one goroutine.
type Merge struct {
	Hold    time.Duration
	waiting []waiting // by the records' times
}

type waiting struct {
	record *Record
	until  time.Time
}

// Add takes in a record that has come now.
func (m *Merge) Add(r *Record, now time.Time) {
	at, _ := slices.BinarySearchFunc(m.waiting, r.Time, func(w waiting, t time.Time) int {
		if w.record.Time.After(t) {
			return 1
		}
		return -1 // of two at one time the first to come
	})
	m.waiting = slices.Insert(m.waiting, at, waiting{r, now.Add(m.Hold)})
}

// Ready gives the records that have waited long enough, and those before them.
func (m *Merge) Ready(now time.Time) (ready []*Record) {
	last := -1
	for i, w := range m.waiting {
		if !now.Before(w.until) {
			last = i
		}
	}
	for _, w := range m.waiting[:last+1] {
		ready = append(ready, w.record)
	}
	m.waiting = slices.Delete(m.waiting, 0, last+1)
	return ready
}

// Rest gives all that still wait.
func (m *Merge) Rest() (rest []*Record) {
	for _, w := range m.waiting {
		rest = append(rest, w.record)
	}
	m.waiting = nil
	return rest
}
