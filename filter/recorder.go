package filter

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

// recorderBuffer holds the events of some tens of thousands of connections, which
// nobody waits for: it may take a while until they are read.
const recorderBuffer = 32 << 20

// RecorderConfig says how connections that aren't queued are recorded.
type RecorderConfig struct {
	// AcceptMark is as in QueueConfig: the bits of the connection mark that tell
	// who was queued, and is in the log already.
	AcceptMark uint32
	// SysctlDir is where the node's sysctls can be written; see SysctlDir.
	SysctlDir string
	// ReadBuffer is the socket's receive buffer in bytes, recorderBuffer if zero.
	ReadBuffer int
}

// Recorder puts into the decision log the connections of the node's pods that
// don't pass the queue, since no policy isolates an end of theirs. It reads of
// them in conntrack's events, so that it costs them nothing but the event.
type Recorder struct {
	cfg    RecorderConfig
	engine *verdict.Engine
	slog   *slog.Logger
	log    *audit.Log
	ring   *audit.Ring
	conn   *netlink.Conn
	closed atomic.Bool
	ended  chan struct{}

	recorded, unjudged, unreadable, unseen atomic.Uint64
}

// RecorderStats counts connections since the recorder was opened.
type RecorderStats struct {
	Recorded uint64 // put into the decision log
	// Unjudged are connections of isolated pods that passed without having been
	// queued: nobody listened and the gate fails open, or the policy isn't older
	// than the connection.
	Unjudged   uint64
	Unseen     uint64 // of which the kernel couldn't tell: the socket's buffer was full
	Unreadable uint64 // whose event made no sense
}

// OpenRecorder begins to record, in the calling thread's network namespace. An
// error is one line that says what to do.
func OpenRecorder(cfg RecorderConfig, engine *verdict.Engine, log *audit.Log, lg *slog.Logger) (*Recorder, error) {
	if cfg.ReadBuffer == 0 {
		cfg.ReadBuffer = recorderBuffer
	}
	if err := CheckEvents(cfg.SysctlDir); err != nil {
		return nil, err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	// A buffer that runs over costs the events that don't fit, which the kernel
	// counts; else it would stop telling until all is read.
	err = errors.Join(conn.SetOption(netlink.NoENOBUFS, true), conn.SetReadBuffer(cfg.ReadBuffer))
	if err == nil {
		err = conn.JoinGroup(unix.NFNLGRP_CONNTRACK_NEW)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("conntrack's events can't be read (CAP_NET_ADMIN and the kernel's nf_conntrack_netlink are needed): %w", err), conn.Close())
	}
	r := &Recorder{cfg: cfg, engine: engine, slog: lg, log: log, ring: log.NewRing(), conn: conn, ended: make(chan struct{})}
	go r.run()
	return r, nil
}

// CheckEvents sees to it that conntrack tells of new connections: if it doesn't,
// the sysctl is switched on. The error says what to do.
func CheckEvents(sysctls string) error {
	const knob = "nf_conntrack_events"
	path := filepath.Join(sysctls, "net/netfilter", knob)
	state, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("conntrack can't tell of new connections: the kernel has no net.netfilter.%s (CONFIG_NF_CONNTRACK_EVENTS)", knob)
	}
	if err == nil && strings.TrimSpace(string(state)) != "0" {
		return nil
	}
	if err == nil {
		err = os.WriteFile(path, []byte("1"), 0o644)
	}
	if err != nil {
		return fmt.Errorf("conntrack doesn't tell of new connections: run sysctl -w net.netfilter.%s=1 on the node (tried: %w)", knob, err)
	}
	return nil
}

// Stats gives the counts. It may be called from any goroutine.
func (r *Recorder) Stats() RecorderStats {
	if r == nil {
		return RecorderStats{}
	}
	return RecorderStats{Recorded: r.recorded.Load(), Unjudged: r.unjudged.Load(), Unseen: r.unseen.Load(), Unreadable: r.unreadable.Load()}
}

// Close ends the recorder, and with it the use of its ring. What the socket holds
// then isn't read any more.
func (r *Recorder) Close() error {
	if r == nil {
		return nil
	}
	r.closed.Store(true)
	err := r.conn.Close()
	<-r.ended
	return err
}

func (r *Recorder) run() {
	defer close(r.ended)
	for {
		messages, err := r.conn.Receive()
		if r.closed.Load() {
			return
		}
		r.countUnseen()
		if err != nil {
			if r.unreadable.Add(1) == 1 {
				r.slog.Error("reading conntrack's events fails; said once, see the metrics", "err", err)
			}
			time.Sleep(pauseAfterError)
			continue
		}
		now := time.Now()
		for _, m := range messages {
			r.event(m, now)
		}
	}
}

// event takes in one connection. One that the queue has let through has the mark,
// whatever policy says by now: so none is logged twice.
func (r *Recorder) event(m netlink.Message, now time.Time) {
	var e conntrack.Event
	if err := e.Unmarshal(m); err != nil {
		r.unreadable.Add(1)
		return
	}
	// What belongs to another connection passes by that one's leave.
	if e.Type != conntrack.EventNew || e.Flow.Mark&r.cfg.AcceptMark != 0 || e.Flow.Status.Expected() {
		return
	}
	s := r.engine.Snapshot()
	if s == nil {
		return
	}
	f := flowOf(e.Flow)
	d := s.Decide(&f)
	switch {
	case !d.Egress.Judged && !d.Ingress.Judged:
	case d.Reason == verdict.ReasonNotIsolated, d.Reason == verdict.ReasonSelf:
		r.recorded.Add(1)
		r.ring.Put(&audit.Record{Time: now.UnixNano(), Flow: f, Decision: d, Snapshot: s, Observed: true})
	case d.Reason == verdict.ReasonRule, d.Reason == verdict.ReasonNoRule:
		r.unjudged.Add(1)
	}
	// Between a node and its own pods nothing is queued, and nothing recorded.
}

// flowOf gives a connection as the queue would see its first packet: after DNAT,
// which the answers' source tells, and before SNAT.
func flowOf(c *conntrack.Flow) verdict.Flow {
	there, back := &c.TupleOrig, &c.TupleReply
	f := verdict.Flow{
		Src:   there.IP.SourceAddress.Unmap(),
		Dst:   back.IP.SourceAddress.Unmap(),
		Proto: verdict.Protocol(there.Proto.Protocol),
	}
	switch {
	case f.Proto.HasPorts():
		f.SrcPort, f.DstPort = there.Proto.SourcePort, back.Proto.SourcePort
	case f.Proto == verdict.ICMP, f.Proto == verdict.ICMPv6:
		f.ICMPType, f.ICMPCode = there.Proto.ICMPType, there.Proto.ICMPCode
	}
	return f
}

// countUnseen reads how many events the socket has dropped (sk_get_meminfo in
// net/core/sock.c; netlink_overrun counts there).
func (r *Recorder) countUnseen() {
	raw, err := r.conn.SyscallConn()
	if err != nil {
		return
	}
	var info [unix.SK_MEMINFO_DROPS + 1]uint32
	size := uint32(unsafe.Sizeof(info))
	err = raw.Control(func(fd uintptr) {
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			size = 0
		}
	})
	if err != nil || size < uint32(unsafe.Sizeof(info)) {
		return
	}
	dropped := uint64(info[unix.SK_MEMINFO_DROPS])
	if before := r.unseen.Swap(dropped); dropped > before {
		r.log.Unseen(dropped - before)
	}
}
