package filter

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

const (
	// stopEvery is how long a worker may wait for a packet before it looks
	// whether it is to stop.
	stopEvery = 200 * time.Millisecond
	// pauseAfterError keeps a socket that only fails from using up a CPU.
	pauseAfterError = 10 * time.Millisecond
	// writeTries is how often a verdict is written before it is given up.
	writeTries = 3
	// yieldEvery is how often a worker with packets goes through Go's scheduler: well
	// before the 10 ms after which it counts as one that doesn't let others run.
	yieldEvery = 2 * time.Millisecond
)

// worker serves one queue: it reads a packet, judges it, writes the verdict,
// and only then counts and logs. Where several packets wait they are read together,
// and their verdicts written together, in order, those before the last counted and
// logged by then. All memory that packets need is here from the start.
type worker struct {
	queue  uint16
	cfg    QueueConfig
	engine *verdict.Engine
	slog   *slog.Logger
	ring   *audit.Ring
	count  counters

	in        *inbox
	packet    queuedPacket
	decoder   *Decoder
	flow      verdict.Flow
	judge     *verdict.Worker
	out       *verdictMessage
	answered  bool   // the packet at hand has its verdict
	outbox    []byte // verdicts that wait for those of the packets behind
	waiting   int    // how many
	more      bool   // packets are behind the one at hand
	forged    verdict.Decision
	turned    verdict.Decision // by the other orientation, see decide
	turns     atomic.Uint64    // odd while packets are in hand, see settle
	record    audit.Record
	midstream bool    // the packet at hand is from the middle of a connection
	held      waiting // packets of unknown pods, see hold.go
}

func newWorker(queue uint16, cfg QueueConfig, engine *verdict.Engine, ring *audit.Ring, lg *slog.Logger) *worker {
	return &worker{
		queue: queue, cfg: cfg, engine: engine, slog: lg, ring: ring,
		in:      newInbox(cfg.Burst, int(cfg.CopyRange)+msgOverhead),
		outbox:  make([]byte, 0, cfg.Burst*len(verdictMessage{}.buf)),
		decoder: NewDecoder(),
		judge:   engine.NewWorker(cfg.CacheSize),
		out:     newVerdictMessage(queue),
		count:   newCounters(),
	}
}

// loop serves the queue until stop is set. No error ends it: a gate that nobody
// serves is shut for everybody.
//
// It has a thread for itself, on the CPUs of its queue, which ends with it. Every
// now and then it yields, when a verdict is out: a goroutine that only goes from one
// system call to the next never passes Go's scheduler, whose monitor takes it after
// 10 ms for one that hogs its processor. It then looks every 20 µs whether it is in
// a system call, and takes the processor away if so: a wake-up of another thread,
// and a search for another processor, for nearly each packet.
func (w *worker) loop(fd int, stop *atomic.Bool) {
	runtime.LockOSThread()
	if err := w.place(); err != nil {
		w.slog.Warn("queue worker isn't scheduled as it should be", "queue", w.queue, "error", err)
	}
	yielded := time.Now()
	defer w.handBack(fd)
	for !stop.Load() {
		w.review(fd)
		// Only the kernel can be the sender: for this netlink protocol a
		// process may address another's socket with CAP_NET_ADMIN only.
		n, err := w.in.read(fd)
		received := time.Now()
		if err != nil {
			w.readFailed(err)
			continue
		}
		w.datagrams(fd, n, received)
		if received.Sub(yielded) > yieldEvery {
			runtime.Gosched()
			yielded = received
		}
	}
}

// place gives the calling thread its CPUs, and its place among those who want them.
func (w *worker) place() error {
	i := int(w.queue - w.cfg.Base)
	if i == w.cfg.Count {
		return lastOfAll()
	}
	return errors.Join(pin(i, w.cfg.Count), promptly())
}

// readFailed counts an error unless it is the time-out or a signal.
func (w *worker) readFailed(err error) {
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return
	}
	if w.count.readErrors.Add(1) == 1 {
		w.slog.Error("reading from the queue fails; said once, see the metrics", "queue", w.queue, "error", err)
	}
	if !errors.Is(err, unix.ENOBUFS) {
		time.Sleep(pauseAfterError)
	}
}

// datagrams serves what one read has brought. When it is done no verdict waits.
func (w *worker) datagrams(fd, n int, received time.Time) {
	w.turns.Add(1)
	for i := range n {
		w.more = i+1 < n
		w.datagram(fd, w.in.datagram(i), received)
	}
	w.send(fd) // where the last was no packet
	w.turns.Add(1)
}

// datagram serves each netlink message of what one read brought.
func (w *worker) datagram(fd int, b []byte, received time.Time) {
	for len(b) > 0 {
		m, rest, err := nextMessage(b)
		w.message(fd, m, err, received)
		b = rest
	}
}

// message serves one netlink message: a packet, or the kernel's complaint about
// a verdict. A packet that can't be read whole is turned away.
func (w *worker) message(fd int, m nlMessage, err error, received time.Time) {
	w.packet.hasID, w.answered = false, false
	defer w.rescue(fd)
	switch m.kind {
	case typePacket:
		w.count.packets.Add(1)
		if perr := parsePacket(m.body, &w.packet); err == nil {
			err = perr
		}
		if err == nil {
			w.serve(fd, received)
			return
		}
		w.count.unparsed.Add(1)
		if w.packet.hasID {
			w.answer(fd, w.out.drop(w.packet.id))
		}
	case unix.NLMSG_ERROR:
		// struct nlmsgerr begins with the negative errno, 0 for a consent.
		if len(m.body) < 4 || binary.NativeEndian.Uint32(m.body) != 0 {
			w.count.verdictErrors.Add(1)
		}
	default:
		w.count.unparsed.Add(1)
	}
}

// serve judges the packet at hand, which may have to wait for its verdict. An
// accept adds its bits to the packet's mark and leaves the others as they are.
func (w *worker) serve(fd int, received time.Time) {
	p := &w.packet
	w.decoder.Decode(p.version, p.payload, p.wireLen, &w.flow)
	w.midstream = w.decoder.Midstream()
	d := w.decide()
	if d.Unknown || len(w.held.list) > 0 {
		if d = w.wait(fd, d, received); d == nil {
			return
		}
	}
	w.finish(fd, d, received)
}

// finish writes the verdict on the packet at hand, counts and logs it.
func (w *worker) finish(fd int, d *verdict.Decision, received time.Time) verdict.Verdict {
	p := &w.packet
	if d.Reason == verdict.ReasonSelf && !p.turnsBack() {
		d = w.unmask(d)
	}
	msg := w.out.drop(p.id)
	if d.Verdict.Passes() {
		msg = w.out.accept(p.id, p.mark, w.cfg.AcceptMark)
	}
	latency := time.Since(received)
	w.answer(fd, msg)

	w.count.decided(d, latency)
	if w.ring != nil {
		w.record.Time, w.record.Latency = received.UnixNano(), int64(latency)
		w.record.Flow, w.record.Decision, w.record.Snapshot = w.flow, *d, w.judge.Snapshot()
		w.ring.Put(&w.record)
	}
	return d.Verdict
}

// unmask makes a denial of the leave that a pod has to reach itself, for a
// packet that only pretends to be the pod's own. The engine, which knows nothing
// of devices, can't see that; its decision may be a cached one and stays as it
// is.
func (w *worker) unmask(d *verdict.Decision) *verdict.Decision {
	w.forged = *d
	w.forged.Verdict, w.forged.Reason = verdict.Deny, verdict.ReasonForged
	for _, side := range []*verdict.Side{&w.forged.Egress, &w.forged.Ingress} {
		if side.Isolated {
			side.Refuse()
			w.forged.Verdict = side.Verdict // both are the same pod's
		}
	}
	return &w.forged
}

// answer gives a verdict. It goes out with those of the packets behind, if there are
// any: the kernel takes as many as a write holds.
func (w *worker) answer(fd int, msg []byte) {
	w.answered = true
	w.outbox = append(w.outbox, msg...)
	if w.waiting++; !w.more || len(w.outbox)+len(w.out.buf) > cap(w.outbox) {
		w.send(fd)
	}
}

// send writes the verdicts that wait. Those that can't be written leave their packets
// waiting in the kernel until the queue is unbound, so it is tried again.
func (w *worker) send(fd int) {
	if w.waiting == 0 {
		return
	}
	var err error
	for range writeTries {
		if err = writeVerdict(fd, w.outbox); err == nil {
			break
		}
	}
	lost := uint64(w.waiting)
	w.outbox, w.waiting = w.outbox[:0], 0
	if err != nil && w.count.verdictErrors.Add(lost) == lost {
		w.slog.Error("writing a verdict fails; said once, see the metrics", "queue", w.queue, "error", err)
	}
}

// writeVerdict writes without telling Go's scheduler, which would take the write for
// a call that may block, and could take the processor away meanwhile. It never
// blocks: the kernel takes the verdict, and sends the packet on, within the call.
func writeVerdict(fd int, msg []byte) error {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(msg))), uintptr(len(msg)))
	if errno != 0 {
		return errno
	}
	return nil
}

// rescue keeps a panic over one packet from ending the worker or opening the
// gate: the packet is turned away, and decoder and cache, whose state can't be
// trusted any more, are made anew.
func (w *worker) rescue(fd int) {
	cause := recover()
	if cause == nil {
		return
	}
	if w.packet.hasID && !w.answered {
		w.answer(fd, w.out.drop(w.packet.id))
	}
	w.decoder = NewDecoder()
	w.judge = w.engine.NewWorker(w.cfg.CacheSize)
	if w.count.panics.Add(1) == 1 {
		w.slog.Error("a packet made a worker panic and was dropped; said once, see the metrics",
			"queue", w.queue, "panic", cause, "hook", w.packet.hook, "in", w.packet.inDev, "out", w.packet.outDev,
			"physIn", w.packet.physIn, "physOut", w.packet.physOut, "stack", string(debug.Stack()))
	}
}
