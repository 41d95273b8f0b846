package filter

import (
	"testing"
	"time"
)

// TestDrain: a packet without a verdict is waited for, for as long as there is time,
// and no longer than it takes.
func TestDrain(t *testing.T) {
	queueNetns(t)
	queueRun(t, "iptables -t mangle -A OUTPUT -p udp -j NFQUEUE --queue-num 100")
	cfg, err := QueueConfig{Base: 100, Count: 1}.complete()
	kernelOK(t, err)
	conn, err := bindQueue(100, cfg) // and nobody reads it
	kernelOK(t, err)
	kernelOK(t, startCopy(conn, 100, cfg.CopyRange))
	q := &Queues{workers: []*worker{{queue: 100}}, table: openKernelTable()}
	defer q.table.close()
	if n := q.Drain(10 * time.Second); n != 0 {
		t.Errorf("%d packets wait in an empty queue", n)
	}
	queueSend(t, "127.0.0.2:9000", "a")
	if n := q.Drain(200 * time.Millisecond); n != 1 {
		t.Errorf("%d packets wait, want 1", n)
	}
	start, answer := time.Now(), 300*time.Millisecond
	time.AfterFunc(answer, func() { conn.Close() }) // the kernel's verdict then: drop
	if n := q.Drain(10 * time.Second); n != 0 || time.Since(start) < answer {
		t.Errorf("%d packets wait after %s", n, time.Since(start))
	}
}
