package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"portcullis/filter"
	"portcullis/filter/audit"
	"portcullis/policycache"
	"portcullis/policycache/cni"
	"portcullis/verdict"
)

// repairInterval is how often the kernel is compared with what it should hold.
const repairInterval = 2 * time.Second

// agent holds the parts together: state comes in from the source, is compiled
// and swapped into the engine, and the kernel is told which pods are isolated.
type agent struct {
	options  *agentOptions
	log      *slog.Logger
	engine   *verdict.Engine
	kernel   *filter.Kernel
	audit    *audit.Log
	logFile  *audit.File // nil if the decision log isn't in a file
	source   source
	compiler *policycache.Compiler
	queueCfg filter.QueueConfig
	metrics  *metrics
	inspect  *inspector

	mu     sync.Mutex
	queues *filter.Queues
	state  agentState
}

// agentState is what /readyz and /metrics tell of the agent.
type agentState struct {
	compiled bool // a policy is compiled and in force
	rules    bool // the rules are in place
	problems []policycache.Problem
	sets     error // what keeps the sets of isolated pods from being right
	bridges  error // what keeps bridged pods from being judged
	repair   error // what the last look at the kernel ended with
	pods     int
	policies int
	isolated int
	judged   int
}

// runAgent enforces until ctx ends.
func runAgent(ctx context.Context, o *agentOptions, stdout io.Writer, log *slog.Logger) (err error) {
	// Parts and libraries that say something on their own say it here; what
	// libraries have to say is detail.
	slog.SetDefault(log)
	slog.SetLogLoggerLevel(slog.LevelDebug)
	a, err := newAgent(o, stdout, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.close()) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopHTTP, err := a.serveHTTP(ctx)
	if err != nil {
		return err
	}
	defer stopHTTP()
	defer a.serveSocket()()
	failed := make(chan error, 1)
	var parts sync.WaitGroup
	parts.Go(func() { a.repairUntil(ctx) })
	parts.Go(func() { a.reopenUntil(ctx) })
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
	source, err := o.cluster.open(log)
	if err != nil {
		return nil, err
	}
	if o.cniResults != "" {
		results, err := cni.NewWatcher(o.cniResults, log)
		if err != nil {
			return nil, fmt.Errorf("--cni-results: %w", err)
		}
		source = resultsSource{source, results, o.node}
	}
	kernel, err := filter.NewKernel(filter.KernelConfig{
		Backend:   o.backend,
		QueueBase: uint16(o.queueBase),
		Queues:    o.queues,
		FailOpen:  o.failOpen,
		MarkBits:  bits,
		Log:       log,
	})
	if err != nil {
		return nil, err
	}
	inspect := newInspector()
	decisions, file, err := o.decisions.open(o.node, stdout, inspect.tapFor(o.socket))
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
		source:   source,
		compiler: policycache.NewCompiler(o.node, log),
		inspect:  inspect,
		queueCfg: filter.QueueConfig{
			Base:       uint16(o.queueBase),
			Count:      o.queues,
			CopyRange:  o.copyRange,
			MaxLen:     o.queueLength,
			ReadBuffer: o.readBuffer,
			FailOpen:   o.failOpen,
			AcceptMark: filter.AcceptedMark(bits),
			CacheSize:  o.cacheSize,
		},
	}
	a.metrics = newMetrics(a)
	return a, nil
}

// apply puts a new state in force: the engine first, so that whatever the
// kernel queues from then on is judged by it, then the sets that say whose
// packets are queued. An error is one that the agent can't go on with.
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
	a.mu.Unlock()
	if err := a.bind(); err != nil {
		return err
	}
	// noteParts asks for its error.
	_ = a.kernel.SetIsolated(isolated)
	a.noteParts()
	a.inspect.applyNow(objects, snapshot)
	a.log.Debug("policy in force", "generation", snapshot.Generation(), "pods", len(objects.Pods),
		"policies", len(objects.Policies), "isolatedAddresses", len(isolated), "took", time.Since(start))
	return a.install()
}

// bind opens the queues, once. Nothing in the kernel is changed before they are
// ours: an agent that finds another one running must leave that one's gate
// alone. Only apply calls it.
func (a *agent) bind() error {
	if a.queues != nil {
		return nil
	}
	if err := a.kernel.CheckAlone(); err != nil {
		return err
	}
	queues, err := filter.OpenQueues(a.queueCfg, a.engine, a.audit, a.log)
	if err != nil {
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
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state.rules = true
	// Reading the whole state leaves behind several times what is kept of it, which
	// the runtime would otherwise hold on to for minutes.
	go debug.FreeOSMemory()
	a.log.Info("enforcing", "node", a.options.node, "backend", a.kernel.Backend(),
		"queues", a.options.queues, "failOpen", a.options.failOpen, "isolatedAddresses", a.state.isolated)
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

// repairUntil compares the kernel with what it should hold, again and again,
// and mends what others have altered.
func (a *agent) repairUntil(ctx context.Context) {
	tick := time.NewTicker(repairInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.repair()
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
	repaired, err := a.kernel.Repair() // which logs what it mends
	a.metrics.repaired(len(repaired))
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

// close leaves the gate as --fail-open says and writes out the decision log.
// Rules that this agent hasn't put in place are another's, and stay.
func (a *agent) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	if a.options.failOpen && a.state.rules {
		errs = append(errs, a.kernel.Remove())
	}
	if a.queues != nil {
		errs = append(errs, a.queues.Close())
	}
	errs = append(errs, a.audit.Close())
	sayClosed(a.log, a.audit.Stats())
	a.log.Info("stopped", "gate", map[bool]string{true: "open", false: "closed"}[a.options.failOpen])
	return errors.Join(errs...)
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
	for part, err := range map[string]error{"sets": a.state.sets, "bridges": a.state.bridges, "rules": a.state.repair} {
		if err != nil {
			why = append(why, part+": "+oneLine(err))
		}
	}
	slices.Sort(why)
	return why
}
