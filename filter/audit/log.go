package audit

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"portcullis/verdict"
)

const (
	// pollEvery is how long a record may lie in its ring, unless that is a slow one: at
	// 100,000 decisions a second on one worker, 500 records. Polling spares the packet path any
	// wake-up.
	pollEvery = 5 * time.Millisecond
	// flushAt is when lines are handed on before the rings are empty, in bytes.
	flushAt = 64 << 10
	// closeWait is how long Close waits for sinks that block.
	closeWait = 2 * time.Second
	// defaultRing is a ring's size in records if none is asked for.
	defaultRing = 4096
)

// Sink is where lines go. W is the seam: whatever takes whole lines by Write,
// from one goroutine, and says by its error what it didn't take.
type Sink struct {
	Name string // for metrics and messages, such as "file"
	W    io.Writer
}

// Config says what is logged, and where.
type Config struct {
	Node  string // this node's name
	Sinks []Sink // without any, and without a tap, the log is off
	Tap   *Tap   // where decisions can be watched; nil for nowhere
	// RingSize is how many records each worker's ring holds, 4096 if zero.
	RingSize int
	// Labels adds the pods' labels to each record.
	Labels bool
	// Window is how long repeats of a denied connection are gathered into one
	// record; zero for not at all.
	Window time.Duration
	// Audit is what is logged where no namespace asks for something else; the
	// zero value is everything.
	Audit verdict.Audit
	// Sample keeps one in so many allows, all if it is one or less.
	Sample int
	// Rate is how many records a second are written at most, zero for any
	// number. As many may come at once.
	Rate int
	// Denied, unless it is nil, is told of each denied connection that the selection
	// has, of repeats the first. It must return at once and not keep the record.
	Denied func(*Record)
}

// Log writes decisions as lines of JSON. The nil Log is one that is off.
type Log struct {
	cfg   Config
	sinks []*sink

	mu    sync.Mutex
	rings []*Ring

	// What follows belongs to the log's goroutine.
	now     time.Time
	record  []byte // the line at hand, but for its tally
	made    bool   // that it is that of the decision at hand
	tapped  []byte // the line as the tap has it
	batch   batch
	repeats *repeats
	limiter *rate.Limiter // nil without a rate
	allow   int           // of Sample allows: which comes next
	keep    int           // and which is kept

	stop    chan struct{}
	stopped chan struct{}
	closing sync.Once

	unselected, sampled, suppressed, held, unseen atomic.Uint64
}

// Stats counts decisions by what became of them. Those that are in none of the
// counts are still on their way.
type Stats struct {
	Unselected uint64 // the selection leaves them out
	Sampled    uint64 // allows that the sampling leaves out
	Suppressed uint64 // more than the rate allows
	Held       uint64 // denials whose window is open
	Sinks      []SinkStats
}

// SinkStats counts the decisions that were to be written to a sink.
type SinkStats struct {
	Name     string
	Written  uint64
	Lost     uint64 // in a full ring, in a full queue, or refused by the sink
	Failures uint64 // how often the sink refused
}

// NewLog starts a log; one without sinks and without a tap, and that tells nobody, is off.
func NewLog(cfg Config) *Log {
	if len(cfg.Sinks) == 0 && cfg.Tap == nil && cfg.Denied == nil {
		return nil
	}
	if cfg.RingSize <= 0 {
		cfg.RingSize = defaultRing
	}
	if cfg.Audit == verdict.AuditDefault {
		cfg.Audit = verdict.AuditAll
	}
	l := &Log{cfg: cfg, stop: make(chan struct{}), stopped: make(chan struct{})}
	l.repeats = newRepeats(cfg.Window, l.render, l.emit)
	if cfg.Rate > 0 {
		l.limiter = rate.NewLimiter(rate.Limit(cfg.Rate), cfg.Rate)
	}
	for _, s := range cfg.Sinks {
		l.sinks = append(l.sinks, newSink(s, cfg.Node, l.missing))
	}
	go l.run()
	return l
}

// NewRing gives a ring that the log empties, for one worker. It is nil, which
// is a usable ring, if the log is off.
func (l *Log) NewRing() *Ring { return l.newRing(math.MaxInt) }

// NewSlowRing gives one of which the log takes so many records a second at most, or
// hardly more. What comes faster finds it full, soon, and is lost and counted: whoever
// floods doesn't have the log take the processor from the others.
func (l *Log) NewSlowRing(rate int) *Ring {
	return l.newRing(max(rate*int(pollEvery)/int(time.Second), 1))
}

func (l *Log) newRing(atOnce int) *Ring {
	if l == nil {
		return nil
	}
	r := newRing(l.cfg.RingSize)
	r.atOnce = min(atOnce, len(r.slots))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rings = append(l.rings, r)
	return r
}

// Stats tells what became of the decisions so far. It may be called from any
// goroutine.
func (l *Log) Stats() (s Stats) {
	if l == nil {
		return s
	}
	s = Stats{Unselected: l.unselected.Load(), Sampled: l.sampled.Load(), Suppressed: l.suppressed.Load(), Held: l.held.Load()}
	inRings := l.missing().lost
	for _, sink := range l.sinks {
		one := sink.stats()
		one.Lost += inRings
		s.Sinks = append(s.Sinks, one)
	}
	return s
}

// missing tells what no sink was given though it was to be logged: what the rate
// suppressed, and what found a ring full.
func (l *Log) missing() missing {
	m := missing{suppressed: l.suppressed.Load(), unseen: l.unseen.Load()}
	for _, r := range l.allRings() {
		m.lost += r.Lost()
	}
	return m
}

// Unseen notes that so many connections, which were to be recorded, couldn't be
// told of, so that the log tells it.
func (l *Log) Unseen(n uint64) {
	if l != nil {
		l.unseen.Add(n)
	}
}

// Close writes what is in the rings and windows and ends the log. Stop the
// workers first: what they put into their rings later is lost. The sinks' writers
// aren't closed. The error is about sinks that block: they are waited for two
// seconds at most, and what they haven't taken by then counts as lost.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.closing.Do(func() { close(l.stop) })
	<-l.stopped // it waits for nobody
	patience := time.After(closeWait)
	var stuck []string
	for _, s := range l.sinks {
		select {
		case <-s.stopped:
			continue
		case <-patience:
		}
		for _, s := range l.sinks {
			if s.abandon() {
				stuck = append(stuck, s.name)
			}
		}
		return fmt.Errorf("decision log: %s takes nothing, the last decisions are not written there", strings.Join(stuck, ", "))
	}
	return nil
}

func (l *Log) run() {
	defer close(l.stopped)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			l.drain(false)
		case <-l.stop:
			l.drain(true)
			l.repeats.flush()
			l.flush()
			l.held.Store(l.repeats.held)
			for _, s := range l.sinks {
				close(s.stop)
			}
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
// them is starved by a busier one, or less from a slow one unless all is asked for, and
// hands it on, with the windows that have ended.
func (l *Log) drain(all bool) {
	l.now = time.Now()
	for _, r := range l.allRings() {
		atOnce := r.atOnce
		if all {
			atOnce = len(r.slots)
		}
		for range atOnce {
			if !r.take(l.decided) {
				break
			}
		}
	}
	if l.cfg.Tap != nil {
		l.cfg.Tap.missed(l.missing().lost)
	}
	l.repeats.expire(l.now)
	l.flush()
	l.held.Store(l.repeats.held)
}

// decided takes in one decision: it is left out, held until its window ends, or
// written.
func (l *Log) decided(rec *Record) {
	rec.refresh()
	if l.cfg.Tap != nil {
		l.tapped = appendTally(append(l.tapped[:0], l.render(rec)...), tally{count: 1})
		l.cfg.Tap.put(rec, l.tapped)
		l.made = true // and isn't made again below
		defer func() { l.made = false }()
	}
	switch {
	case !l.selected(&rec.Decision):
		l.unselected.Add(1)
	case rec.Revoked: // once, so there is no repeat to wait for
		l.emit(l.render(rec), tally{count: 1})
	case rec.Decision.Verdict == verdict.Deny:
		if l.repeats.add(rec, l.now) && l.cfg.Denied != nil {
			l.cfg.Denied(rec)
		}
	case rec.Decision.Verdict == verdict.WouldDeny:
		// It passes, so nobody tries it again.
		l.emit(l.render(rec), tally{count: 1})
	case l.cfg.Sample > 1 && !l.sample():
		l.sampled.Add(1)
	default:
		l.emit(l.render(rec), tally{count: 1, sample: l.cfg.Sample})
	}
}

// selected tells whether a decision is to be logged at all. The namespaces of
// the judged ends are asked; if both ends are judged, who wants more has it.
func (l *Log) selected(d *verdict.Decision) bool {
	want := verdict.AuditDefault
	for _, end := range [2]struct {
		judged bool
		pod    *verdict.Endpoint
	}{{d.Egress.Judged, d.Src}, {d.Ingress.Judged, d.Dst}} {
		if !end.judged || end.pod == nil {
			continue
		}
		asked := end.pod.Audit
		if asked == verdict.AuditDefault {
			asked = l.cfg.Audit
		}
		want = max(want, asked)
	}
	if want == verdict.AuditDefault {
		want = l.cfg.Audit
	}
	return want == verdict.AuditAll || want == verdict.AuditDenied && d.Verdict != verdict.Allow
}

// sample keeps one of each Sample allows in a row. Which one is chance, so that
// traffic with a rhythm, such as IPv4 and IPv6 in turn, is sampled fairly.
func (l *Log) sample() bool {
	if l.allow == 0 {
		l.keep = rand.IntN(l.cfg.Sample)
	}
	kept := l.allow == l.keep
	l.allow = (l.allow + 1) % l.cfg.Sample
	return kept
}

// render makes a record's line but for its tally, good until the next call.
func (l *Log) render(rec *Record) []byte {
	if l.made {
		return l.record
	}
	l.record = appendRecord(l.record[:0], l.cfg.Node, l.cfg.Labels, rec)
	return l.record
}

// emit writes a line, if the rate allows one.
func (l *Log) emit(record []byte, t tally) {
	if l.limiter != nil && !l.limiter.AllowN(l.now, 1) {
		l.suppressed.Add(t.count)
		return
	}
	l.batch.lines = appendTally(append(l.batch.lines, record...), t)
	l.batch.counts = append(l.batch.counts, t.count)
	if len(l.batch.lines) >= flushAt {
		l.flush()
	}
}

// flush hands the lines at hand to all sinks, which share them from then on.
func (l *Log) flush() {
	if len(l.batch.counts) == 0 {
		return
	}
	for _, s := range l.sinks {
		s.offer(l.batch)
	}
	l.batch = batch{}
}
