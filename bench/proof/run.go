package proof

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

const (
	killed     = syscall.SIGKILL
	terminated = syscall.SIGTERM
)

// Results are all that a run has found.
type Results struct {
	Params    Params
	Started   time.Time
	Took      time.Duration
	variants  []variant
	rounds    map[string][]found   // by variant
	connects  map[string][]float64 // of all rounds, microseconds
	changes   []change
	reactions []reactionOf
	stages    stages
	staged    []float64          // connects while stages were measured, microseconds
	micro     map[string]float64 // microbenchmarks, nanoseconds
	traced    traced
	refused   error // why nothing could be traced
}

// reactionOf is a series of changes in one variant's world.
type reactionOf struct {
	variant string
	reaction
	memory memory // the agent's, afterwards
}

// Programs are the programs that a run starts: the agent, and the program that
// plays roles (RunRole), which is usually the running one. Source is the
// repository, for the microbenchmarks; empty leaves them out. Plane is the directory
// of etcd and kube-apiserver.
type Programs struct{ Agent, Self, Source, Plane string }

// run is a run in progress.
type run struct {
	Results
	programs Programs
	worlds   []*world
	say      func(format string, args ...any)
}

// Run measures everything that the parameters ask for. It tells its progress by
// say. All namespaces and processes are gone when it returns, whatever happened.
func Run(ctx context.Context, p Params, programs Programs, say func(format string, args ...any)) (_ *Results, err error) {
	variants, err := choose(p)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "portcullis-proof-")
	if err != nil {
		return nil, err
	}
	r := &run{programs: programs, say: say, Results: Results{
		Params: p, Started: time.Now(), variants: variants,
		rounds: map[string][]found{}, connects: map[string][]float64{},
	}}
	defer func() { err = errors.Join(err, r.close(), os.RemoveAll(dir)) }()
	for _, step := range []func(context.Context) error{
		func(ctx context.Context) error { return r.build(ctx, dir) }, r.measureRounds, r.measureChanges, r.measureReactions,
		func(ctx context.Context) error { return r.measureAPI(ctx, dir) }, r.measureBudget,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	r.Took = time.Since(r.Started)
	return &r.Results, nil
}

func (r *run) close() error {
	var errs []error
	for _, w := range r.worlds {
		errs = append(errs, w.lab.Close())
	}
	return errors.Join(errs...)
}

// build makes every variant's world, stopped.
func (r *run) build(ctx context.Context, dir string) error {
	for i, v := range r.variants {
		start := time.Now()
		own := filepath.Join(dir, v.name)
		if err := os.Mkdir(own, 0o755); err != nil {
			return err
		}
		w, err := newWorld(ctx, v, r.Params, i, r.programs.Agent, r.programs.Self, own)
		if err != nil {
			return err
		}
		r.worlds = append(r.worlds, w)
		if err := w.freeze(); err != nil {
			return err
		}
		r.say("%-24s in place after %s: %s", v.name, time.Since(start).Round(time.Millisecond), v.about)
	}
	return nil
}

// measureRounds measures every variant once a round.
func (r *run) measureRounds(ctx context.Context) error {
	for round := range r.Params.Rounds {
		for _, i := range rotation(len(r.worlds), round) {
			w := r.worlds[i]
			f, connects, err := w.measureOnce(ctx, r.Params)
			if err != nil {
				return fmt.Errorf("round %d: %s: %w", round+1, w.name, err)
			}
			r.rounds[w.name] = append(r.rounds[w.name], f)
			r.connects[w.name] = append(r.connects[w.name], connects...)
			r.say("round %d  %-24s connect p50 %6.1f µs  p99 %7.1f µs  %6.0f/s  failed %.0f, SYNs sent again %.0f", round+1, w.name,
				f[connectP50], f[connectP99], f[floodFigure(r.Params.Clients, 1)], f[failures], f[resent])
		}
	}
	return nil
}

// measureChanges times one policy's coming and going where the number of policies
// is what differs.
func (r *run) measureChanges(ctx context.Context) error {
	for _, w := range r.worlds {
		if w.kind != chainsKind && (w.kind != agentKind || w.log || w.args != nil || w.env != nil) || r.Params.Changes < 1 || r.Params.Variants == "tune" {
			continue
		}
		c, err := w.changes(ctx, r.Params.Changes)
		if err != nil {
			return err
		}
		r.Results.changes = append(r.Results.changes, c)
		r.say("change   %-24s added %.1f ms, removed %.1f ms", w.name, summarize(c.Add).median, summarize(c.Remove).median)
	}
	return nil
}

// measureReactions times changes that come fast, at each size of cluster.
func (r *run) measureReactions(ctx context.Context) error {
	for _, n := range r.Params.Policies {
		w := r.world(agentName(n))
		if w == nil || r.Params.Reactions < 1 {
			continue
		}
		if err := writeManifests(filepath.Join(w.dir, "open.json"), changePolicy("open", openLabel)); err != nil {
			return err
		}
		if err := r.react(ctx, w, w.name, "-dir", w.dir); err != nil {
			return err
		}
	}
	return nil
}

// react measures one series of changes, and what memory the agent has after it.
func (r *run) react(ctx context.Context, w *world, name string, args ...string) error {
	found, err := w.reactions(ctx, r.Params, args...)
	if err != nil {
		return fmt.Errorf("%s: reactions: %w", name, err)
	}
	m, err := memoryOf(w.gate)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	r.reactions = append(r.reactions, reactionOf{name, found, m})
	sorted, made := micros(found.LatencyNs), micros(found.MadeNs)
	r.say("reaction %-24s p50 %.1f ms, p99 %.1f ms, failed %d; made in %.1f ms, p99 %.1f ms; %.0f MiB resident, %.0f at most", name, percentile(sorted, 0.5)/1e3,
		percentile(sorted, 0.99)/1e3, found.Failed, percentile(made, 0.5)/1e3, percentile(made, 0.99)/1e3, m.resident, m.peak)
	return nil
}

// measureBudget looks into the echo, and into the agent by its microbenchmarks.
func (r *run) measureBudget(ctx context.Context) (err error) {
	if w := r.world(pinnedName); w != nil {
		if r.stages, r.staged, err = w.measureStages(ctx, r.Params); err != nil {
			return fmt.Errorf("stages: %w", err)
		}
	}
	if w := r.world(agentName(r.Params.Policies[0])); w != nil {
		if r.traced, r.refused, err = w.measureTrace(ctx, r.Params); err != nil {
			return fmt.Errorf("trace: %w", err)
		}
		r.say("traced   %-24s %d packets; refused: %v", w.name, len(r.traced[0]), r.refused)
	}
	if r.programs.Source == "" || r.world(agentName(r.Params.Policies[0])) == nil {
		return nil
	}
	r.micro, err = microbenchmarks(ctx, r.programs.Source, r.Params.Microbench)
	return err
}

// world finds a variant's world; nil if it isn't measured.
func (r *run) world(name string) *world {
	for _, w := range r.worlds {
		if w.name == name {
			return w
		}
	}
	return nil
}
