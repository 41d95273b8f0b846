package filter

import "time"

// settleWait bounds how long settle waits for one worker. A verdict takes some
// microseconds; a worker that takes longer has been put off by the system.
const settleWait = 100 * time.Millisecond

// Settle waits until every packet that a worker has in hand now has its verdict.
// The kernel takes a packet on within the call that writes the verdict, as far as
// conntrack's confirmation, so the connections that an earlier policy has let in
// are all in conntrack's table then. It waits for a tenth of a second at most, and
// tells whether that was enough.
func (q *Queues) Settle() bool {
	settled := true
	for _, w := range q.workers {
		settled = w.settle() && settled
	}
	return settled
}

func (w *worker) settle() bool {
	before := w.turns.Load()
	if before%2 == 0 {
		return true
	}
	for end := time.Now().Add(settleWait); w.turns.Load() == before; {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(50 * time.Microsecond)
	}
	return true
}
