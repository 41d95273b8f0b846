// Package audit is the decision log: it carries every decision from the packet
// path to a file without ever holding up a verdict.
//
// Each worker puts fixed-size records into a ring of its own; one goroutine
// empties all rings every few milliseconds and writes one JSON object per line:
//
//	time        when the packet was received, RFC 3339 with nanoseconds, UTC
//	node        the node that judged
//	verdict     "allow" or "deny"
//	reason      one word of verdict.Reasons: "rule", "no-rule", "self", ...
//	directions  those that this node judged: "egress", "ingress", both or none
//	protocol    "TCP", "UDP", "SCTP", "ICMP", "ICMPv6", or the number as a string
//	src, dst    {"ip", "port", "namespace", "pod"}: ip is "" if it couldn't be
//	            read, port is there only for a whole TCP, UDP or SCTP packet,
//	            namespace and pod only where the address is a pod's
//	icmpType, icmpCode
//	            for whole ICMP and ICMPv6 packets only
//	egress, ingress
//	            only if judged: {"verdict", "isolated", "policies": the isolating
//	            policies as "namespace/name", "allowedBy": {"policy", "rule"},
//	            the rule by its index, or null}
//	cached      whether the verdict came from the flow cache
//	latencyNs   nanoseconds from receiving the packet to writing its verdict
//
// Lines of one worker are in the order of its decisions; those of different
// workers may be a few milliseconds out of order.
package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// pollEvery is how long a record may lie in its ring: at 100,000 decisions
	// a second on one worker, 500 records. Polling spares the packet path any
	// wake-up.
	pollEvery = 5 * time.Millisecond
	// flushAt is when lines are written before the rings are empty, in bytes.
	flushAt = 64 << 10
	// closeWait is how long Close waits for a writer that blocks.
	closeWait = 2 * time.Second
	// defaultRing is a ring's size in records if none is asked for.
	defaultRing = 4096
)

// Log writes decisions as lines of JSON. The nil Log is one that is off.
type Log struct {
	w        io.Writer
	node     string
	ringSize int

	mu    sync.Mutex
	rings []*Ring

	buf     []byte
	lines   uint64 // in buf
	torn    bool   // the last write ended inside a line
	stop    chan struct{}
	stopped chan struct{}
	closing sync.Once

	written, unwritten, failures atomic.Uint64
}

// NewLog starts a log that writes to w; a nil w is a log that is off. Each
// worker's ring holds ringSize records, 4096 if it is zero or less.
func NewLog(w io.Writer, node string, ringSize int) *Log {
	if w == nil {
		return nil
	}
	if ringSize <= 0 {
		ringSize = defaultRing
	}
	l := &Log{w: w, node: node, ringSize: ringSize, stop: make(chan struct{}), stopped: make(chan struct{})}
	go l.run()
	return l
}

// NewRing gives a ring that the log empties, for one worker. It is nil, which
// is a usable ring, if the log is off.
func (l *Log) NewRing() *Ring {
	if l == nil {
		return nil
	}
	r := newRing(l.ringSize)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rings = append(l.rings, r)
	return r
}

// Written says how many decisions have been written.
func (l *Log) Written() uint64 {
	if l == nil {
		return 0
	}
	return l.written.Load()
}

// Lost says how many decisions never will be: those that found their ring full,
// and those that the writer refused.
func (l *Log) Lost() uint64 {
	if l == nil {
		return 0
	}
	n := l.unwritten.Load()
	for _, r := range l.allRings() {
		n += r.Lost()
	}
	return n
}

// Failures says how often the writer has refused.
func (l *Log) Failures() uint64 {
	if l == nil {
		return 0
	}
	return l.failures.Load()
}

// Close writes what is in the rings and ends the log. Stop the workers first:
// what they put into their rings later is lost. The writer isn't closed. The
// error is about a writer that blocks: it is waited for two seconds at most.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.closing.Do(func() { close(l.stop) })
	select {
	case <-l.stopped:
		return nil
	case <-time.After(closeWait):
		return errors.New("decision log: its reader takes nothing, the last decisions are not written")
	}
}

func (l *Log) run() {
	defer close(l.stopped)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.drain()
		case <-l.stop:
			l.drain()
			return
		}
	}
}

func (l *Log) allRings() []*Ring {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rings[:len(l.rings):len(l.rings)]
}

// drain takes from each ring as much as it could hold at once, so that none of
// them is starved by a busier one, and writes it.
func (l *Log) drain() {
	use := func(rec *Record) {
		l.buf = appendLine(l.buf, l.node, rec)
		l.lines++
	}
	for _, r := range l.allRings() {
		for range len(r.slots) {
			if !r.take(use) {
				break
			}
			if len(l.buf) >= flushAt {
				l.flush()
			}
		}
	}
	l.flush()
}

// flush writes the lines at hand. Lines that the writer refuses are lost, not
// tried again: what comes after them is worth as much.
func (l *Log) flush() {
	if l.lines == 0 {
		return
	}
	var n int
	var err error
	if l.torn {
		// What a failed write left of a line must not spoil the next one.
		n, err = l.w.Write([]byte{'\n'})
		l.torn = n != 1
		n = 0
	}
	if !l.torn {
		n, err = l.w.Write(l.buf)
	}
	done := l.lines
	if err != nil {
		done = uint64(bytes.Count(l.buf[:n], []byte{'\n'}))
		if n > 0 {
			l.torn = l.buf[n-1] != '\n'
		}
		if l.failures.Add(1) == 1 {
			slog.Error("decision log: can't write, decisions are being lost; said once, see the metrics", "error", err)
		}
	}
	l.written.Add(done)
	l.unwritten.Add(l.lines - done)
	l.buf, l.lines = l.buf[:0], 0
}

// OpenSink opens what the log is to be written to: a File, or the standard
// output for "-". Closing the standard output's sink does nothing.
func OpenSink(path string) (io.WriteCloser, error) {
	if path == "-" {
		return stdout{}, nil
	}
	f := &File{path: path}
	return f, f.Reopen()
}

// File is a file that the log is appended to, created for its owner only. Its
// methods may be called from several goroutines.
type File struct {
	path string
	mu   sync.Mutex
	f    *os.File
}

// Reopen opens the file by its name anew, as is needed after it was renamed or
// removed to make room for a new one. If that fails, the old one stays in use.
func (s *File) Reopen() error {
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("decision log: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.f
	s.f = f
	if old == nil {
		return nil
	}
	return old.Close()
}

// Write appends to the file.
func (s *File) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.f.Write(b)
}

// Close closes the file.
func (s *File) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.f.Close()
}

type stdout struct{}

func (stdout) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (stdout) Close() error                { return nil }
