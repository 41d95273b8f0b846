package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

// What QueueConfig's zero fields stand for.
const (
	// DefaultCopyRange holds an IPv6 header, eight extension headers of
	// ordinary size and a TCP header several times over.
	DefaultCopyRange = 512
	DefaultMaxLen    = 4096
	// DefaultReadBuffer has room for as many packets as DefaultMaxLen lets
	// wait, at about two KiB of kernel memory each.
	DefaultReadBuffer = 8 << 20
	// DefaultBurst is few enough that the first packet of a burst doesn't wait long for
	// the decisions on the others.
	DefaultBurst = 16

	// minCopyRange is room for the longest IPv4 header and a TCP header;
	// maxCopyRange is what a netlink attribute can hold.
	minCopyRange = 80
	maxCopyRange = 65531
	// MaxBurst is how many packets are read together at most.
	MaxBurst = 256
)

// QueueConfig says which queues to serve and how.
type QueueConfig struct {
	// Base is the first queue's number, Count how many follow on from it, each
	// with a worker and a system thread of its own.
	Base  uint16
	Count int
	// CopyRange is how many bytes of each packet are looked at. Headers that
	// reach beyond it are judged as truncated.
	CopyRange uint32
	// MaxLen is how many packets may wait for their verdict in each queue.
	MaxLen uint32
	// ReadBuffer is each socket's receive buffer, in bytes.
	ReadBuffer int
	// Burst is how many packets are read at most, where they wait, before their
	// verdicts go out together.
	Burst int
	// FailOpen has the kernel accept what a full queue can't take; else it is
	// dropped.
	FailOpen bool
	// AcceptMark holds the bits that an accept sets in the packet's mark.
	AcceptMark uint32
	// CacheSize is how many flows each worker remembers; 0 remembers none.
	CacheSize int
	// Hold is for how long packets of unknown pods (verdict.Decision.Unknown) wait
	// until their pods are known; zero or less: they don't. HoldMax is how many of
	// them each queue holds, at most half of its length; zero means DefaultHoldMax.
	Hold    time.Duration
	HoldMax int
	// NoisyRate is KernelConfig's: other than zero, the queue after the last is
	// served too, with what is left of the processor.
	NoisyRate int
}

// complete puts the defaults in and refuses what can't be.
func (c QueueConfig) complete() (QueueConfig, error) {
	if c.CopyRange == 0 {
		c.CopyRange = DefaultCopyRange
	}
	if c.MaxLen == 0 {
		c.MaxLen = DefaultMaxLen
	}
	if c.ReadBuffer == 0 {
		c.ReadBuffer = DefaultReadBuffer
	}
	if c.Burst == 0 {
		c.Burst = DefaultBurst
	}
	if c.HoldMax == 0 {
		c.HoldMax = DefaultHoldMax
	}
	switch {
	case c.Count < 1:
		return c, fmt.Errorf("%d queues: at least one is needed", c.Count)
	case c.last() > 65535:
		return c, fmt.Errorf("queues %d to %d: the last queue is 65535", c.Base, c.last())
	case c.CopyRange < minCopyRange || c.CopyRange > maxCopyRange:
		return c, fmt.Errorf("copy range of %d bytes: it must be %d to %d", c.CopyRange, minCopyRange, maxCopyRange)
	case c.Burst < 1 || c.Burst > MaxBurst:
		return c, fmt.Errorf("bursts of %d packets: they must be of 1 to %d", c.Burst, MaxBurst)
	case c.ReadBuffer < 0 || c.ReadBuffer > 1<<30-1: // the kernel doubles it, in an int
		return c, fmt.Errorf("receive buffer of %d bytes: it must be below 1 GiB", c.ReadBuffer)
	}
	return c, nil
}

// last gives the last queue's number, which may be more than there can be.
func (c QueueConfig) last() int { return int(c.Base) + QueueSpan(c.Count, c.NoisyRate) - 1 }

// of gives what the queue with this index is configured with.
func (c QueueConfig) of(i int) QueueConfig {
	if i == c.Count {
		c.MaxLen = min(c.MaxLen, noisyMaxLen)
	}
	c.HoldMax = min(c.HoldMax, max(int(c.MaxLen/2), 1)) // a queue full of what is held takes no more
	return c
}

// Queues are bound queues with running workers.
type Queues struct {
	workers []*worker
	conns   []*netlink.Conn // those not handed to their worker yet
	sockets []int           // those that workers serve
	table   *kernelTable
	stop    atomic.Bool
	running sync.WaitGroup
	close   sync.Once
	closed  error
}

// OpenQueues binds all queues, or none if one can't be bound, in the calling
// thread's network namespace, and starts to serve them: each packet is judged
// by the engine, each decision goes to the decision log (which may be nil) once
// its verdict is out. An error is one line that says what to do.
//
// The sockets are go-nfqueue's. It configures a queue only together with a
// reading loop, which allocates for each packet, and which may take a packet
// for the answer to a step of the configuration when there is traffic already.
// So both are done here.
func OpenQueues(cfg QueueConfig, engine *verdict.Engine, log *audit.Log, lg *slog.Logger) (*Queues, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	q := &Queues{}
	for i := range QueueSpan(cfg.Count, cfg.NoisyRate) {
		queue := cfg.Base + uint16(i)
		conn, err := bindQueue(queue, cfg.of(i))
		if err != nil {
			return nil, errors.Join(explainBind(queue, err), q.Close())
		}
		q.conns = append(q.conns, conn)
		ring := log.NewRing
		if i == cfg.Count {
			ring = func() *audit.Ring { return log.NewSlowRing(noisyRecords) }
		}
		q.workers = append(q.workers, newWorker(queue, cfg.of(i), engine, ring(), lg))
	}
	q.table = openKernelTable()
	for _, w := range q.workers {
		conn := q.conns[0]
		q.conns = q.conns[1:]
		if err := q.serve(conn, w, cfg.CopyRange); err != nil {
			return nil, errors.Join(fmt.Errorf("queue %d: %w", w.queue, err), q.Close())
		}
	}
	return q, nil
}

// serve lets the packets in and starts the worker. The connection is closed: from
// then on its socket is the worker's.
func (q *Queues) serve(conn *netlink.Conn, w *worker, copyRange uint32) error {
	if err := startCopy(conn, w.queue, copyRange); err != nil {
		return errors.Join(err, conn.Close())
	}
	fd, err := takeOver(conn)
	if err != nil {
		return err
	}
	q.sockets = append(q.sockets, fd)
	q.running.Go(func() { w.loop(fd, &q.stop) })
	return nil
}

// Close ends the workers and unbinds the queues. Packets that still wait are
// dropped by the kernel; those that come later find no queue, and what becomes
// of them is the rule's to say (--queue-bypass). It returns when every worker
// has ended, which takes a fifth of a second at most.
func (q *Queues) Close() error {
	q.close.Do(func() {
		q.stop.Store(true)
		q.running.Wait()
		for _, fd := range q.sockets {
			q.closed = errors.Join(q.closed, unix.Close(fd))
		}
		for _, conn := range q.conns {
			q.closed = errors.Join(q.closed, conn.Close())
		}
		q.closed = errors.Join(q.closed, q.table.close())
	})
	return q.closed
}

// Stats gives each worker's counters and what the kernel counts of its queue.
func (q *Queues) Stats() []QueueStats {
	rows := q.table.rows()
	all := make([]QueueStats, len(q.workers))
	for i, w := range q.workers {
		all[i] = w.count.stats(w.queue)
		for _, r := range rows {
			if r.queue == w.queue {
				all[i].Waiting, all[i].KernelDropped, all[i].UserDropped = r.waiting, r.dropped, r.userDropped
			}
		}
	}
	return all
}

// Netlink configuration of a queue (enum nfqnl_attr_config, and struct
// nfqnl_msg_config_cmd and nfqnl_msg_config_params, of nfnetlink_queue.h).
const (
	cfgCmd     = 1
	cfgParams  = 2
	cfgMaxLen  = 3
	cfgMask    = 4
	cfgFlags   = 5
	cfgCmdBind = 1
)

// bindQueue opens a socket and binds the queue to it, flags and length
// included. A queue that was just bound copies nothing to its socket, and so
// nothing but the kernel's answer can arrive here, however busy the rule is
// that feeds it: packets are turned away until startCopy.
func bindQueue(queue uint16, cfg QueueConfig) (*netlink.Conn, error) {
	nfq, err := nfqueue.Open(&nfqueue.Config{NfQueue: queue})
	if err != nil {
		return nil, err
	}
	conn := nfq.Con
	flags := uint32(nfqueue.NfQaCfgFlagGSO)
	if cfg.FailOpen {
		flags |= nfqueue.NfQaCfgFlagFailOpen
	}
	msg, err := configMessage(queue, netlink.Acknowledge,
		netlink.Attribute{Type: cfgCmd, Data: []byte{cfgCmdBind, 0, 0, 0}},
		netlink.Attribute{Type: cfgMaxLen, Data: bigEndian32(cfg.MaxLen)},
		netlink.Attribute{Type: cfgMask, Data: bigEndian32(flags)},
		netlink.Attribute{Type: cfgFlags, Data: bigEndian32(flags)})
	if err == nil {
		_, err = conn.Execute(msg)
	}
	if err == nil {
		err = conn.SetReadBuffer(cfg.ReadBuffer)
	}
	if err == nil {
		// A receive buffer that runs over costs the packets that don't fit,
		// which the kernel counts; the socket stays usable all the same.
		err = conn.SetOption(netlink.NoENOBUFS, true)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// startCopy has the queue hand its packets out. No answer is asked for, since
// packets may come before it; the kernel has none but consent to give.
func startCopy(conn *netlink.Conn, queue uint16, copyRange uint32) error {
	params := append(bigEndian32(copyRange), nfqueue.NfQnlCopyPacket)
	msg, err := configMessage(queue, 0, netlink.Attribute{Type: cfgParams, Data: params})
	if err == nil {
		_, err = conn.Send(msg)
	}
	return err
}

func configMessage(queue uint16, flags netlink.HeaderFlags, attrs ...netlink.Attribute) (netlink.Message, error) {
	body, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return netlink.Message{}, err
	}
	head := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(queue >> 8), byte(queue)}
	return netlink.Message{
		Header: netlink.Header{Type: typeConfig, Flags: netlink.Request | flags},
		Data:   append(head, body...),
	}, nil
}

func bigEndian32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// takeOver takes the socket away from the connection and from Go's poller, and
// closes the connection. A worker has a thread for itself, and a read that blocks
// there costs one system call for a packet where a poller costs two.
//
// It isn't enough to read past the poller: as long as the poller knows the socket,
// each packet wakes the thread that waits in it besides the worker's, for nothing.
// Only closing the descriptor that it knows ends that; the socket lives on under
// another one.
func takeOver(conn *netlink.Conn) (int, error) {
	fd, err := duplicate(conn)
	if err = errors.Join(err, conn.Close()); err == nil {
		err = makeBlocking(fd)
	}
	if err != nil && fd >= 0 {
		unix.Close(fd)
	}
	return fd, err
}

// duplicate gives another descriptor of the connection's socket, -1 with an error.
func duplicate(conn *netlink.Conn) (fd int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(cerr, err); err != nil {
		return -1, err
	}
	return fd, nil
}

// makeBlocking has reads wait for a packet. The time-out is how a worker without
// packets notices that it is to stop.
func makeBlocking(fd int) error {
	if err := unix.SetNonblock(fd, false); err != nil {
		return err
	}
	tv := unix.NsecToTimeval(int64(stopEvery))
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// explainBind turns a refusal to bind into a line that says what to do.
// The kernel answers EPERM both without CAP_NET_ADMIN and for a queue of
// another socket (nfqnl_recv_config); who owns a queue is in its table.
func explainBind(queue uint16, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EBUSY):
		owner, bound := queueOwner(queue)
		if bound || errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("queue %d is already bound by another process (netlink port %d): stop it (another agent on this node?), or choose other queues with --queue-base", queue, owner)
		}
		return fmt.Errorf("no permission to bind queue %d: run as root or with CAP_NET_ADMIN: %w", queue, err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel can't queue packets to a process (queue %d): load the module nfnetlink_queue, or use a kernel with CONFIG_NETFILTER_NETLINK_QUEUE: %w", queue, err)
	}
	return fmt.Errorf("binding queue %d: %w", queue, err)
}
