package filter

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/verdict"
)

const (
	// DefaultHoldMax is how many packets of unknown pods each queue holds.
	DefaultHoldMax = 512
	// holdPoll is how often a worker that holds packets looks whether their pods are
	// known now, when no packet comes that has it look anyway.
	holdPoll = 5 * time.Millisecond
	// holdShare is the part of the room that one sender may take, and one unknown
	// receiver: so neither a pod that scans the node's addresses, nor a flood to one of
	// them, leaves no room for others' packets.
	holdShare = 8
)

// held is a packet that waits until its pod is known: all that its verdict needs but
// the payload, which is decoded.
type held struct {
	packet    queuedPacket
	flow      verdict.Flow
	midstream bool
	to        netip.Addr // the receiver if it isn't known, else the zero Addr
	received  time.Time
}

// waiting are the packets that a worker holds, in the order in which they came, so
// that those of one flow stay in theirs.
type waiting struct {
	list []held
	// by is the snapshot that knows none of their pods; a later one may.
	by *verdict.Snapshot
	// shares are how many packets of the list each sender, and each unknown receiver,
	// has.
	shares map[netip.Addr]int
}

// HoldStats are what a queue counts of packets of unknown pods.
type HoldStats struct {
	// Now are held at this moment; Total were, ever.
	Now, Total uint64
	// Known are those whose pod became known in time, Expired those whose time was
	// up, by the verdict that they then got.
	Known, Expired [verdict.VerdictCount]uint64
	// Full were not held for want of room, and got at once the verdict that they would
	// have had at the end. Returned went back to the kernel when the worker ended.
	Full, Returned uint64
}

// holdCounters are HoldStats in the making; see counters.
type holdCounters struct {
	now            atomic.Int64
	total          atomic.Uint64
	known, expired byVerdict
	full, returned atomic.Uint64
}

func (c *holdCounters) stats() HoldStats {
	return HoldStats{
		Now: uint64(c.now.Load()), Total: c.total.Load(),
		Known: c.known.load(), Expired: c.expired.load(),
		Full: c.full.Load(), Returned: c.returned.Load(),
	}
}

// wait is for a packet at hand about an unknown pod, and for any while others are
// held. It gives the decision for the packet, nil if the packet is held from now on.
//
// What a new snapshot has to say to packets that are held comes before what it says
// to a new one, which may be of the same flow.
func (w *worker) wait(fd int, d *verdict.Decision, received time.Time) *verdict.Decision {
	for len(w.held.list) > 0 && w.judge.Snapshot() != w.held.by {
		packet, flow, midstream := w.packet, w.flow, w.midstream
		w.reconsider(fd)
		w.packet, w.flow, w.midstream, w.answered = packet, flow, midstream, false
		d = w.decide()
	}
	if !d.Unknown || w.cfg.Hold <= 0 {
		return d
	}
	var to netip.Addr
	if w.judge.Snapshot().Unknown(w.flow.Dst) {
		to = w.flow.Dst
	}
	share := max(w.cfg.HoldMax/holdShare, 1)
	if len(w.held.list) >= w.cfg.HoldMax || w.held.shares[w.flow.Src] >= share || w.held.shares[to] >= share {
		w.count.hold.full.Add(1)
		return d
	}
	w.hold(fd, to, received)
	return nil
}

// hold puts the packet at hand aside.
func (w *worker) hold(fd int, to netip.Addr, received time.Time) {
	h := &w.held
	if len(h.list) == 0 {
		h.by = w.judge.Snapshot()
		w.readTimeout(fd, holdPoll)
	}
	if h.shares == nil {
		h.shares = map[netip.Addr]int{}
	}
	h.shares[w.flow.Src]++
	if to.IsValid() {
		h.shares[to]++
	}
	packet := w.packet
	packet.payload = nil // of the buffer that the next read uses
	h.list = append(h.list, held{packet, w.flow, w.midstream, to, received})
	w.count.hold.total.Add(1)
	w.count.hold.now.Add(1)
}

// review gives their verdicts to those held packets whose pods are known by now or
// whose time is up. The loop calls it after each read that has packets to hold.
func (w *worker) review(fd int) {
	if len(w.held.list) == 0 {
		return
	}
	if w.engine.Snapshot() != w.held.by {
		w.reconsider(fd)
		return
	}
	for now := time.Now(); len(w.held.list) > 0 && w.expired(&w.held.list[0], now); {
		one := w.held.list[0]
		w.held.list = w.held.list[1:]
		w.retry(fd, &one, now)
		w.let(&one)
	}
	w.rest(fd)
}

func (w *worker) expired(h *held, now time.Time) bool { return now.Sub(h.received) >= w.cfg.Hold }

// reconsider judges all held packets again, in their order, and keeps those whose
// pods aren't known yet and whose time isn't up.
func (w *worker) reconsider(fd int) {
	w.held.by = w.engine.Snapshot()
	now := time.Now()
	all := w.held.list
	w.held.list = nil
	for i := range all {
		if w.retry(fd, &all[i], now) {
			w.held.list = append(w.held.list, all[i])
		} else {
			w.let(&all[i])
		}
	}
	w.rest(fd)
}

// let forgets a packet that is out of the list.
func (w *worker) let(h *held) {
	less := func(a netip.Addr) {
		if w.held.shares[a]--; w.held.shares[a] <= 0 {
			delete(w.held.shares, a)
		}
	}
	less(h.flow.Src)
	if h.to.IsValid() {
		less(h.to)
	}
	w.count.hold.now.Add(-1)
}

// rest has reads wait as long as usual again once nothing is held.
func (w *worker) rest(fd int) {
	if len(w.held.list) == 0 {
		w.held.list = nil // its head may have moved away from the memory that it had
		w.readTimeout(fd, stopEvery)
	}
}

// retry judges a held packet again, and tells whether it stays held.
func (w *worker) retry(fd int, h *held, now time.Time) (stays bool) {
	w.packet, w.flow, w.midstream, w.answered = h.packet, h.flow, h.midstream, false
	defer w.rescue(fd)
	d := w.decide()
	if d.Unknown && !w.expired(h, now) {
		return true
	}
	by := &w.count.hold.known
	if d.Unknown {
		by = &w.count.hold.expired
	}
	by[w.finish(fd, d, h.received)].Add(1)
	return false
}

// handBack ends the holding when the worker ends. The packets go through their hook
// again, as they are: where another agent's rules are in place by now, to that one's
// queue; where the rules are gone, on their way; and else back into this queue, with
// which they end.
func (w *worker) handBack(fd int) {
	for i := range w.held.list {
		p := &w.held.list[i].packet
		w.answer(fd, w.out.again(p.id, p.mark))
		w.count.hold.returned.Add(1)
		w.count.hold.now.Add(-1)
	}
	w.held = waiting{}
}

// again gives the message that sends packet id through its hook again, as it is.
func (m *verdictMessage) again(id, mark uint32) []byte {
	b := m.buf[:]
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.BigEndian.PutUint32(b[24:], nfRepeat)
	binary.BigEndian.PutUint32(b[28:], id)
	binary.BigEndian.PutUint32(b[36:], mark)
	return b
}

// readTimeout sets for how long a read waits for a packet. If that can't be set,
// which the kernel never says of such a socket, held packets wait a little longer.
func (w *worker) readTimeout(fd int, d time.Duration) {
	tv := unix.NsecToTimeval(int64(d))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil && w.count.readErrors.Add(1) == 1 {
		w.slog.Error("a queue's time-out can't be set", "queue", w.queue, "error", err)
	}
}
