package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"portcullis/filter"
	"portcullis/filter/audit"
	"portcullis/policycache"
	"portcullis/policycache/cni"
	"portcullis/policycache/kube"
	"portcullis/verdict"
)

// repairInterval is how often the kernel is compared with what it should hold.
const repairInterval = 2 * time.Second

// repairPause is what lies between two repairs of what was seen to be altered.
const repairPause = 250 * time.Millisecond

// agent holds the parts together: state comes in from the source, is compiled
// and swapped into the engine, and the kernel is told which pods are isolated.
type agent struct {
	options  *agentOptions
	log      *slog.Logger
	engine   *verdict.Engine
	kernel   *filter.Kernel
	audit    *audit.Log
	logFile  *audit.File  // nil if the decision log isn't in a file
	events   *kube.Events // nil unless events are written on denied pods
	source   source
	compiler *policycache.Compiler
	queueCfg filter.QueueConfig
	metrics  *metrics
	revoker  *filter.Revoker
	vacated  vacated
	spoof    *antiSpoof // nil without --anti-spoof
	inspect  *inspector

	mu     sync.Mutex
	queues *filter.Queues
	// recorder is nil unless connections that aren't queued are recorded.
	recorder *filter.Recorder
	state    agentState
}

// agentState is what /readyz and /metrics tell of the agent.
type agentState struct {
	compiled bool // a policy is compiled and in force
	rules    bool // the rules are in place
	problems []policycache.Problem
	sets     error // what keeps the sets of isolated pods from being right
	bridges  error // what keeps bridged pods from being judged
	repair   error // what the last look at the kernel ended with
	record   error // what keeps connections that aren't queued from being recorded
	pods     int
	policies int
	isolated int
	judged   int

	invalid, isolatedPods, auditOnlyPods int
}

// enforce enforces until ctx ends. If a newer agent takes over the error is a
// *handedOver.
func enforce(ctx context.Context, o *agentOptions, stdout io.Writer, log *slog.Logger) (err error) {
	// Parts and libraries that say something on their own say it here; what
	// libraries have to say is detail.
	slog.SetDefault(log)
	slog.SetLogLoggerLevel(slog.LevelDebug)
	loadTightly()
	a, err := newAgent(o, stdout, log)
	if err != nil {
		return err
	}
	defer func() { err = a.close(err) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopHTTP, err := a.serveHTTP(ctx)
	if err != nil {
		return err
	}
	defer stopHTTP()
	defer a.serveSocket(ctx)()
	failed := make(chan error, 1)
	var parts sync.WaitGroup
	parts.Go(func() { a.repairUntil(ctx) })
	parts.Go(func() { a.reopenUntil(ctx) })
	parts.Go(func() { a.eventsUntil(ctx) })
	parts.Go(func() { a.watchSuccessor(ctx, cancel) })
	parts.Go(func() { a.revoker.Run(ctx) })
	parts.Go(func() { a.forgetUntil(ctx) })
	parts.Go(func() { a.spoofUntil(ctx) })
	err = a.source.run(ctx, func(objects *policycache.Objects) {
		if err := a.apply(objects); err != nil {
			select {
			case failed <- err:
			default:
			}
			cancel()
		}
	})
	cancel()
	parts.Wait()
	select {
	case err := <-failed:
		return err
	default:
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// newAgent checks that enforcement can work and opens what needs no state. It
// changes nothing in the kernel.
func newAgent(o *agentOptions, stdout io.Writer, log *slog.Logger) (*agent, error) {
	bits, err := filter.ParseMarkBits(o.markBits)
	if err != nil {
		return nil, fmt.Errorf("--mark-bits: %w", err)
	}
	source, results, err := o.openSource(log)
	if err != nil {
		return nil, err
	}
	kernel, err := filter.NewKernel(o.kernelConfig(bits, log))
	if err != nil {
		return nil, err
	}
	events, err := o.openEvents(log)
	if err != nil {
		return nil, err
	}
	inspect := newInspector()
	decisions, file, err := o.decisions.open(o.node, stdout, inspect.tapFor(o.socket), denied(events))
	if err != nil {
		return nil, err
	}
	a := &agent{
		options:  o,
		log:      log,
		engine:   verdict.NewEngine(),
		kernel:   kernel,
		audit:    decisions,
		logFile:  file,
		events:   events,
		source:   source,
		compiler: policycache.NewCompiler(o.node, log),
		inspect:  inspect,
		queueCfg: o.queueConfig(bits),
	}
	if o.auditOnly {
		a.compiler.SetMode(verdict.ModeAuditOnly)
		log.Warn("audit-only mode: what policy would deny passes and is logged as would-deny, unless a namespace or the node says otherwise")
	}
	a.compiler.SetUnknown(o.hold.policy())
	a.vacated.wake = make(chan struct{}, 1)
	if o.antiSpoof {
		a.spoof = newAntiSpoof(results, log)
	}
	a.metrics = newMetrics(a)
	a.revoker = a.newRevoker(bits)
	return a, nil
}

// openSource opens where the state comes from, and the CNI plugins' results, nil where
// they aren't read.
func (o *agentOptions) openSource(log *slog.Logger) (source, *cni.Watcher, error) {
	source, err := o.cluster.open(log)
	if err != nil || o.cniResults == "" {
		return source, nil, err
	}
	results, err := cni.NewWatcher(o.cniResults, log)
	if err != nil {
		return nil, nil, fmt.Errorf("--cni-results: %w", err)
	}
	return resultsSource{source, results, o.node}, results, nil
}

func (o *agentOptions) kernelConfig(bits uint32, log *slog.Logger) filter.KernelConfig {
	return filter.KernelConfig{
		Backend:     o.backend,
		QueueBase:   uint16(o.queueBase),
		Queues:      o.queues,
		FailOpen:    o.failOpen,
		MarkBits:    bits,
		NoisyRate:   o.noisyRate,
		HoldUnknown: o.hold.hold > 0,
		Log:         log,
	}
}

func (o *agentOptions) queueConfig(bits uint32) filter.QueueConfig {
	return filter.QueueConfig{
		Base:       uint16(o.queueBase),
		Count:      o.queues,
		CopyRange:  o.copyRange,
		MaxLen:     o.queueLength,
		ReadBuffer: o.readBuffer,
		Burst:      o.burst,
		FailOpen:   o.failOpen,
		AcceptMark: filter.AcceptedMark(bits),
		CacheSize:  o.cacheSize,
		Hold:       o.hold.hold,
		HoldMax:    o.hold.packets,
		NoisyRate:  o.noisyRate,
	}
}

// apply puts a new state in force: the engine first, so that whatever the
// kernel queues from then on is judged by it, then the sets that say whose
// packets are queued, and then the connections that are open already. An error is
// one that the agent can't go on with.
func (a *agent) apply(objects *policycache.Objects) error {
	start := time.Now()
	snapshot := a.compiler.Compile(objects)
	a.metrics.compiled(time.Since(start))
	a.engine.Swap(snapshot)
	isolated, judged := snapshot.IsolatedAddrs(), snapshot.JudgedAddrs()
	a.mu.Lock()
	a.state.compiled = true
	a.state.problems = slices.Clone(a.compiler.Problems())
	a.state.pods, a.state.policies = len(objects.Pods), len(objects.Policies)
	a.state.isolated, a.state.judged = len(isolated), len(judged)
	a.state.invalid = a.compiler.Invalid()
	a.state.isolatedPods, a.state.auditOnlyPods = countPods(snapshot, isolated)
	a.mu.Unlock()
	if err := a.bind(); err != nil {
		return err
	}
	a.record()
	unguarded := !a.state.rules || a.kernel.SetsError() != nil
	a.kernel.WatchUnknown(snapshot.PodRanges().Prefixes(), snapshot.KnownAddrs())
	a.kernel.SetPods(judged)
	// noteParts asks for its error.
	_ = a.kernel.SetIsolated(isolated)
	a.noteParts()
	a.spoof.look()
	a.inspect.applyNow(objects, snapshot)
	a.log.Debug("policy in force", "generation", snapshot.Generation(), "pods", len(objects.Pods),
		"policies", len(objects.Policies), "isolatedAddresses", len(isolated), "took", time.Since(start))
	if err := a.install(); err != nil {
		return err
	}
	a.rejudge(snapshot, unguarded)
	a.vacated.add(snapshot.Vacated())
	return nil
}

// countPods tells how many pods have these addresses, and how many of them are in
// audit-only mode.
func countPods(s *verdict.Snapshot, addrs []netip.Addr) (pods, auditOnly int) {
	seen := make(map[*verdict.Endpoint]bool, len(addrs))
	for _, a := range addrs {
		if pod := s.Endpoint(a); !seen[pod] {
			seen[pod] = true
			pods++
			if pod.AuditOnly {
				auditOnly++
			}
		}
	}
	return pods, auditOnly
}

// bind opens the queues, once, beside those of an agent that may run already and
// whose gate is left alone until install. Only apply calls it.
func (a *agent) bind() error {
	if a.queues != nil {
		return nil
	}
	var queues *filter.Queues
	if err := a.kernel.Join(func(base uint16) (err error) {
		a.queueCfg.Base = base
		queues, err = filter.OpenQueues(a.queueCfg, a.engine, a.audit, a.log)
		return err
	}); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.queues = queues
	return nil
}

// install puts the rules in place, once. Only apply calls it, without a.mu: an
// iptables command may wait long for other programs' commands, and /readyz must
// not wait with it.
func (a *agent) install() error {
	if a.state.rules {
		return nil
	}
	if err := a.kernel.Install(); err != nil {
		return err
	}
	a.removeLeftSpoof()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state.rules = true
	go boundGarbage()
	a.log.Info("enforcing", "node", a.options.node, "backend", a.kernel.Backend(),
		"firstQueue", a.queueCfg.Base, "queues", a.options.queues, "failOpen", a.options.failOpen, "isolatedAddresses", a.state.isolated)
	return nil
}

// note keeps a part's trouble, nil for none, and logs when it comes, changes or
// goes.
func (a *agent) note(what string, trouble *error, now error) {
	before := *trouble
	*trouble = now
	switch {
	case now != nil && (before == nil || before.Error() != now.Error()):
		a.log.Error(what, "err", oneLine(now))
	case now == nil && before != nil:
		a.log.Info("mended: " + what)
	}
}

// repairUntil compares the kernel with what it should hold, again and again and when
// something may have been altered, and mends what others have altered.
func (a *agent) repairUntil(ctx context.Context) {
	altered, err := a.kernel.Watch(ctx)
	if err != nil {
		a.log.Warn("what others alter is found within seconds only", "err", oneLine(err))
	}
	tick := time.NewTicker(repairInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.repair()
		case <-altered:
			a.repair()
			select { // whoever alters things in a loop doesn't have the agent do so too
			case <-ctx.Done():
			case <-time.After(repairPause):
			}
		}
	}
}

func (a *agent) repair() {
	a.mu.Lock()
	installed := a.state.rules
	a.mu.Unlock()
	if !installed {
		return
	}
	a.record()
	repaired, err := a.kernel.Repair() // which logs what it mends
	if errors.Is(err, filter.ErrSuperseded) {
		return // watchSuccessor sees it too
	}
	a.metrics.repaired(len(repaired))
	if len(repaired) > 0 {
		a.revoker.Everything() // the gate may have stood open
	}
	a.inspect.noteRepairs(repaired)
	a.mu.Lock()
	a.note("the kernel's rules can't be checked or repaired", &a.state.repair, err)
	a.mu.Unlock()
	a.noteParts()
}

// noteParts notes how sets and bridges are doing now. What apply and repair may
// change both at once is looked at under the lock, so that an older finding
// never takes the place of a newer one.
func (a *agent) noteParts() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.note("sets of isolated pods are not up to date", &a.state.sets, a.kernel.SetsError())
	a.note("bridged pods can't be judged", &a.state.bridges, filter.CheckBridges(a.options.sysctlDir, a.engine.Snapshot().JudgedAddrs()))
}

// reopenUntil opens the decision log's file anew on each SIGHUP, for those who
// rotate logs by renaming them. The signal, which is sent by a terminal that
// goes away too, never ends the agent.
func (a *agent) reopenUntil(ctx context.Context) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
		}
		if a.logFile == nil {
			continue
		}
		if err := a.logFile.Reopen(); err != nil {
			a.log.Error("the decision log can't be opened anew, the old file stays in use", "err", err)
			continue
		}
		a.log.Info("decision log opened anew")
	}
}

// close leaves the gate as --fail-open says, or to the agent that has taken it over,
// and writes out the decision log. Rules that this agent hasn't put in place are
// another's, and stay. It gives what the agent ended with.
func (a *agent) close(cause error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	errs := []error{cause}
	superseded, gate := a.state.rules && a.superseded(), "closed"
	switch {
	case superseded:
		gate = "handed over to a newer agent"
		errs = append(errs, a.drain())
	case a.options.failOpen && a.state.rules:
		gate = "open"
		errs = append(errs, a.kernel.Remove())
	}
	if a.queues != nil {
		errs = append(errs, a.queues.Close())
	}
	errs = append(errs, a.recorder.Close(), a.audit.Close())
	sayClosed(a.log, a.audit.Stats())
	a.log.Info("stopped", "gate", gate)
	if err := errors.Join(errs...); !superseded {
		return errors.Join(err, a.kernel.Leave())
	}
	return &handedOver{a.kernel, errors.Join(errs...)}
}

// unready lists why the agent is not ready, nothing when it is.
func (a *agent) unready() []string {
	why := a.source.unready()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.state.compiled {
		why = append(why, "policy: not compiled")
	}
	if a.queues == nil {
		why = append(why, "queues: not bound")
	}
	if !a.state.rules {
		why = append(why, "rules: not in place")
	}
	for part, err := range map[string]error{"sets": a.state.sets, "bridges": a.state.bridges, "rules": a.state.repair, "open connections": a.revoker.Unready()} {
		if err != nil {
			why = append(why, part+": "+oneLine(err))
		}
	}
	why = append(why, a.spoof.unready()...)
	slices.Sort(why)
	return why
}
