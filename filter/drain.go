package filter

import "time"

const (
	drainLook = 20 * time.Millisecond
	// drainQuiet is how many looks in a row must find the queues empty. A packet
	// that was among rules which have just gone may still be on its way to a queue.
	drainQuiet = 5
)

// Drain waits until every packet in these queues has its verdict and no more come,
// for as long as it is given at most, and gives how many packets still wait. It is
// for queues that no rule leads to any more: Close drops what waits.
func (q *Queues) Drain(most time.Duration) (waiting uint64) {
	quiet, before := 0, q.taken()
	for end := time.Now().Add(most); ; time.Sleep(drainLook) {
		waiting = 0
		for _, s := range q.Stats() {
			waiting += s.Waiting
		}
		if now := q.taken(); waiting == 0 && now == before {
			quiet++
		} else {
			quiet, before = 0, now
		}
		if quiet >= drainQuiet || time.Now().After(end) {
			return waiting
		}
	}
}

// taken counts the packets that the workers have read.
func (q *Queues) taken() (n uint64) {
	for _, w := range q.workers {
		n += w.count.packets.Load()
	}
	return n
}
