package filter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

const (
	// lookEvery is how long a look at the open connections leaves the next one
	// waiting, so that a stream of changes is gathered: at the least, for after a
	// look that took longer the pause is as long as the look.
	lookEvery = 150 * time.Millisecond
	// awaitEvery is how often Await looks.
	awaitEvery = 5 * time.Millisecond
	// lookAgain is when each change is looked at once more. A packet that passed
	// our rules just before a set knew its pod, or that another program's queue
	// holds, may come into conntrack's table after the first look.
	lookAgain = 300 * time.Millisecond
	// looksDue is how often each change is looked at.
	looksDue = 2
	// retryAfter is when a look is tried again that failed.
	retryAfter = 500 * time.Millisecond
)

// RevokeConfig says what a Revoker works with.
type RevokeConfig struct {
	Engine *verdict.Engine
	// MarkBits are as in KernelConfig.
	MarkBits uint32
	// Settle is called before each look: Queues.Settle, or nil for none.
	Settle func()
	// Ring takes a record for each connection that is revoked; nil is for none.
	Ring *audit.Ring
	// Observe is told how long each look took; nil is for nobody.
	Observe func(time.Duration)
	Log     *slog.Logger
}

// Revoker applies changes of policy to connections that are open already. It looks
// for those in conntrack's table whose ends a change concerns, judges each of them
// as if it began now, and sets the revoked bit in the connmark of those that are
// denied, which the rules then drop in both directions; the accepted bit goes. It
// takes the bit off those that are allowed again. To delete the entries instead
// would not do: TCP's next segment, from either side, would make another one.
//
// Its methods but Run may be called from any goroutine.
type Revoker struct {
	cfg  RevokeConfig
	wake chan struct{}

	mu      sync.Mutex
	due     map[netip.Addr]int // looks that are still due, by address
	allDue  int                // and those at all connections
	looked  bool               // all have been looked at once
	trouble error              // of the last look
	begun   int                // looks
	ended   int                // the last one that has ended
	count   revokeCounters

	// What follows belongs to the looks.
	pause   time.Duration // before the next look
	entries int           // in the table when all of it was last seen
}

type revokeCounters struct{ looks, judged, revoked, restored, errors atomic.Uint64 }

// RevokeStats count since the start.
type RevokeStats struct {
	Looks    uint64 // at conntrack's table
	Judged   uint64 // connections, each time
	Revoked  uint64 // connections
	Restored uint64 // connections, that were allowed again
	Errors   uint64 // looks that failed
}

// NewRevoker makes a revoker that has nothing to do yet.
func NewRevoker(cfg RevokeConfig) *Revoker {
	if cfg.MarkBits == 0 {
		cfg.MarkBits = DefaultMarkBits
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Revoker{cfg: cfg, wake: make(chan struct{}, 1), due: map[netip.Addr]int{}, pause: lookEvery}
}

// Changed has the connections from and to these addresses judged anew. Call it when
// the snapshot that changes their meaning is in force and the sets are up to date.
func (r *Revoker) Changed(addrs []netip.Addr) {
	if len(addrs) == 0 {
		return
	}
	r.mu.Lock()
	for _, a := range addrs {
		r.due[a] = looksDue
	}
	r.mu.Unlock()
	r.rouse()
}

// Everything has all connections judged anew: at the start, and whenever there may
// have been nobody at the gate.
func (r *Revoker) Everything() {
	r.mu.Lock()
	r.allDue = looksDue
	r.mu.Unlock()
	r.rouse()
}

// Await waits until there has been a look for all that was asked for before, but not
// beyond ctx.
func (r *Revoker) Await(ctx context.Context) {
	r.mu.Lock()
	awaited := r.begun // which may be on its way
	if r.allDue > 0 || len(r.due) > 0 {
		awaited++
	}
	r.mu.Unlock()
	tick := time.NewTicker(awaitEvery)
	defer tick.Stop()
	for {
		r.mu.Lock()
		ended := r.ended
		r.mu.Unlock()
		if ended >= awaited {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (r *Revoker) rouse() {
	select {
	case r.wake <- struct{}{}:
	default: // it is awake
	}
}

// Stats gives the counts so far.
func (r *Revoker) Stats() RevokeStats {
	c := &r.count
	return RevokeStats{c.looks.Load(), c.judged.Load(), c.revoked.Load(), c.restored.Load(), c.errors.Load()}
}

// Unready tells why open connections may not be as policy has them, nil if they are
// but for changes that are being looked at.
func (r *Revoker) Unready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.trouble == nil && !r.looked {
		return errors.New("not judged yet")
	}
	return r.trouble
}

// Run looks whenever there is something to look at, until ctx ends. It speaks to
// the conntrack of the network namespace of its thread.
func (r *Revoker) Run(ctx context.Context) {
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-again.C:
		}
		next := r.look()
		select {
		case <-ctx.Done():
			return
		case <-time.After(r.pause):
		}
		if next > 0 {
			again.Reset(max(0, next-r.pause))
		}
	}
}

// look judges what is due, once, and gives when the next look is due by itself,
// zero for never. What is due stays so if it fails.
func (r *Revoker) look() (next time.Duration) {
	all, addrs := r.take()
	if !all && len(addrs) == 0 {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.ended = r.begun
		return 0
	}
	if r.cfg.Settle != nil {
		r.cfg.Settle()
	}
	start := time.Now()
	l := look{Revoker: r, snapshot: r.cfg.Engine.Snapshot(), all: all, addrs: addrs, edited: map[string]bool{}}
	err := l.run()
	took := time.Since(start)
	r.count.looks.Add(1)
	if r.cfg.Observe != nil {
		r.cfg.Observe(took)
	}
	if l.revoked+l.restored > 0 {
		r.cfg.Log.Info("open connections judged anew", "revoked", l.revoked, "restored", l.restored, "generation", l.snapshot.Generation(), "took", took)
	}
	r.pause = max(lookEvery, took)
	return r.settleUp(all, addrs, err)
}

// take gives what is due, and notes that it is being looked at.
func (r *Revoker) take() (all bool, addrs map[netip.Addr]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun++
	if all = r.allDue > 0; all {
		r.allDue--
	}
	addrs = make(map[netip.Addr]bool, len(r.due))
	for a, n := range r.due {
		addrs[a] = true
		if r.due[a] = n - 1; n == 1 {
			delete(r.due, a)
		}
	}
	return all, addrs
}

// settleUp notes how a look ended, and tells when the next one is due. What failed
// is put back.
func (r *Revoker) settleUp(all bool, addrs map[netip.Addr]bool, err error) (next time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = r.begun
	before := r.trouble
	r.trouble = err
	if err != nil {
		r.count.errors.Add(1)
		if before == nil {
			r.cfg.Log.Error("open connections can't be judged anew; tried again, and said once", "err", err)
		}
		if all {
			r.allDue = min(r.allDue+1, looksDue)
		}
		for a := range addrs {
			r.due[a] = min(r.due[a]+1, looksDue)
		}
		return retryAfter
	}
	if before != nil {
		r.cfg.Log.Info("mended: open connections are judged anew")
	}
	r.looked = r.looked || all
	if r.allDue > 0 || len(r.due) > 0 {
		return lookAgain
	}
	return 0
}

// walkWorth is how many entries it takes the time of to have the kernel walk its
// table once more, most of which is the walk over its buckets: as measured with
// 262,144 of them, 30 ms, beside 1.2 µs for an entry that is handed out and judged.
const walkWorth = 25_000

// look is one look at conntrack's table.
type look struct {
	*Revoker
	snapshot *verdict.Snapshot
	all      bool
	addrs    map[netip.Addr]bool

	table, other *ctSocket           // other for what is asked and changed meanwhile
	local        map[netip.Addr]bool // the node's own addresses, once they are needed
	edits        []markEdit
	revocations  []revocation     // one per edit
	edited       map[string]bool  // tuples, for a dump may give an entry twice
	turned       verdict.Decision // see turnedDown
	record       audit.Record

	seen, revoked, restored int
	refused                 error // a change that the kernel didn't make
}

// revocation is what is to be said about an edit once it is made. Nothing is said,
// or counted, of one that was revoked before, nor of a TCP connection that is over:
// its bit is set all the same, for what conntrack takes for the end, its two ends may
// have staged.
type revocation struct {
	restored, quiet bool
	flow            verdict.Flow
	decision        verdict.Decision
}

func (l *look) run() (err error) {
	if l.snapshot == nil {
		return errors.New("no policy is in force yet")
	}
	if l.table, err = openCT(); err != nil {
		return err
	}
	defer l.table.close()
	if l.other, err = openCT(); err != nil {
		return err
	}
	defer l.other.close()
	for _, pick := range l.picks() {
		l.seen = 0
		if err := l.table.dump(pick, l.entry); err != nil {
			return err
		}
		if err := l.flush(); err != nil {
			return err
		}
		if pick.family == unix.AF_UNSPEC {
			l.entries = l.seen
		}
	}
	return l.refused
}

// picks says what to ask the kernel for, so that all that is due is among it: all of
// the table in one walk, or, if that is long, in a few walks what has the addresses.
// A walk for an IPv4 address finds those whose first end it is, or whose answering
// one; IPv6 is walked as a whole (see ctPick).
func (l *look) picks() (picks []ctPick) {
	v6 := false
	for a := range l.addrs {
		if a.Is6() {
			v6 = true
		} else if len(picks) < l.entries/walkWorth {
			picks = append(picks, ctPick{unix.AF_INET, a, false}, ctPick{unix.AF_INET, a, true})
		}
	}
	if v6 {
		picks = append(picks, ctPick{family: unix.AF_INET6})
	}
	if l.all || len(picks) >= l.entries/walkWorth {
		return []ctPick{{family: unix.AF_UNSPEC}}
	}
	return picks
}

// entry judges one entry, if a change concerns it.
func (l *look) entry(e *ctEntry) error {
	l.seen++
	if !l.concerned(e) {
		return nil
	}
	l.count.judged.Add(1)
	f, d, err := l.judge(e)
	if err != nil {
		return err
	}
	accepted, revoked := AcceptedMark(l.cfg.MarkBits), RevokedMark(l.cfg.MarkBits)
	edit := markEdit{family: e.family, bits: revoked, mask: accepted | revoked}
	switch denied := d.Verdict == verdict.Deny && !l.nodes(f.Src, f.Dst); {
	case denied == (e.mark&revoked != 0) && !(denied && e.mark&accepted != 0):
		return nil
	case !denied:
		edit = markEdit{family: e.family, mask: revoked}
	}
	key := string(e.tuple) + string(e.zone)
	if l.edited[key] {
		return nil
	}
	l.edited[key] = true
	edit.tuple = append([]byte(nil), e.tuple...)
	if e.zone != nil {
		edit.zone = append([]byte(nil), e.zone...)
	}
	l.edits = append(l.edits, edit)
	l.revocations = append(l.revocations, revocation{edit.bits == 0, e.over || edit.bits != 0 && e.mark&revoked != 0, f, d})
	if len(l.edits) == ctBatch {
		return l.flush()
	}
	return nil
}

// concerned tells whether an end of the connection, or of the one that expected it,
// is one whose meaning has changed.
func (l *look) concerned(e *ctEntry) bool {
	return l.all || l.addrs[e.orig.src] || l.addrs[e.reply.src] || e.master.src.IsValid() && (l.addrs[e.master.src] || l.addrs[e.master.dst])
}

// judge decides about a connection as about its first packet. One that a helper of
// conntrack's expected, such as FTP's for data, passed the gate as RELATED to the
// one that announced it, and stands or falls with it, as long as that is there.
func (l *look) judge(e *ctEntry) (verdict.Flow, verdict.Decision, error) {
	if e.master.src.IsValid() {
		m, found, err := l.other.master(e)
		if err != nil {
			return verdict.Flow{}, verdict.Decision{}, err
		}
		if found {
			e = &m
		}
	}
	f := e.flow()
	d := l.snapshot.Decide(&f)
	if e.midstream && turnedDown(l.snapshot, &f, &d, &l.turned) {
		d = l.turned
	}
	return f, d, nil
}

// nodes tells whether an end is the node itself, by any of its addresses: such a
// connection doesn't come by the rules, and no verdict was ever asked for.
func (l *look) nodes(src, dst netip.Addr) bool {
	if l.local == nil {
		l.local = localAddrs()
	}
	return src.IsLoopback() || dst.IsLoopback() || l.local[src] || l.local[dst]
}

// flush makes the changes at hand, and tells of those that were made. One that the
// kernel refuses keeps no other from being made; the look counts as failed.
func (l *look) flush() error {
	if len(l.edits) == 0 {
		return nil
	}
	err := l.other.mark(l.edits, func(i int, err error) {
		switch r := &l.revocations[i]; {
		case errors.Is(err, unix.ENOENT): // it has ended since
		case err != nil:
			l.refused = fmt.Errorf("change a connection's mark: %w", err)
		case r.quiet:
		case r.restored:
			l.restored++
			l.count.restored.Add(1)
		default:
			l.revoked++
			l.count.revoked.Add(1)
			l.tell(r)
		}
	})
	l.edits, l.revocations = l.edits[:0], l.revocations[:0]
	return err
}

// tell puts a revoked connection into the decision log.
func (l *look) tell(r *revocation) {
	if l.cfg.Ring == nil {
		return
	}
	l.record = audit.Record{Time: time.Now().UnixNano(), Flow: r.flow, Decision: r.decision, Snapshot: l.snapshot, Revoked: true}
	l.cfg.Ring.Put(&l.record)
}
