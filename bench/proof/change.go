package proof

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"portcullis/bench/lab"
)

// change is what one change of one policy has taken, alone, until the kernel
// enforced it, in milliseconds.
type change struct {
	Variant  string
	Kind     kind
	Policies int
	OnPod    bool // all of them on the measured pods
	Add      []float64
	Remove   []float64
}

// changeOnce adds or removes the policy that admits clients to changePort and
// gives the time from before anything was touched until a datagram's fate told so.
func (w *world) changeOnce(ctx context.Context, add bool) (time.Duration, error) {
	args := append(onePair(), fmt.Sprintf("-admitted=%v", add), "-limit", changeLimit.String())
	watch, err := w.start(ctx, clientHost, []string{"GOMAXPROCS=4"}, "probe", args...)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := w.change(ctx, add); err != nil {
		return 0, err
	}
	if err := watch.Wait(changeLimit + time.Second); err != nil {
		return 0, fmt.Errorf("%w: %s", err, watch.Output())
	}
	var s switched
	if err := lastJSON(watch.Output(), &s); err != nil {
		return 0, err
	}
	return time.Unix(0, s.AtNs).Sub(start), nil
}

// changeLimit bounds one change.
const changeLimit = time.Minute

func (w *world) change(ctx context.Context, add bool) error {
	if w.kind == chainsKind {
		w.chains.changed = add
		return w.rebuildChains(ctx)
	}
	file := filepath.Join(w.dir, "change.json")
	if add {
		return writeManifests(file, changePolicy("change", labels("role", "server")))
	}
	return removeManifest(file)
}

// changes measures a number of changes in each direction.
func (w *world) changes(ctx context.Context, n int) (c change, err error) {
	c = change{Variant: w.name, Kind: w.kind, Policies: w.policies(), OnPod: w.cluster.elsewhere == 0}
	if err := w.thaw(ctx); err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, w.freeze()) }()
	for range n {
		for _, add := range []bool{true, false} {
			took, err := w.changeOnce(ctx, add)
			if err != nil {
				return c, fmt.Errorf("%s: change: %w", w.name, err)
			}
			ms := float64(took) / 1e6
			if add {
				c.Add = append(c.Add, ms)
			} else {
				c.Remove = append(c.Remove, ms)
			}
		}
	}
	return c, nil
}

// reactions has a role make many changes at a rate while it watches each; args say where.
func (w *world) reactions(ctx context.Context, p Params, args ...string) (r reaction, err error) {
	if err := w.thaw(ctx); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, w.freeze()) }()
	args = append(append(pairArgs(p.Pairs), "-rate", fmt.Sprint(p.Rate), "-changes", fmt.Sprint(p.Reactions)), args...)
	err = w.ask(ctx, &r, "react", args...)
	return r, err
}

// measureStages runs an echo that looks at the clock, in place of the world's own,
// while connections are made one after the other.
func (w *world) measureStages(ctx context.Context, p Params) (s stages, connects []float64, err error) {
	if err := w.gate.Signal(killed); err != nil {
		return s, nil, err
	}
	<-w.gate.Done()
	if w.gate, err = w.start(ctx, lab.Node, w.env, "echo", append(w.queueArgs(), "--stamps")...); err != nil {
		return s, nil, err
	}
	f := found{}
	if connects, err = w.connects(ctx, p, f); err != nil {
		return s, nil, err
	}
	if err := w.gate.Signal(terminated); err != nil {
		return s, nil, err
	}
	if err := w.gate.Wait(startLimit); err != nil {
		return s, nil, fmt.Errorf("%w: %s", err, w.gate.Output())
	}
	out := w.gate.Output()
	w.gate = nil
	err = lastJSON(out[strings.Index(out, serving):], &s)
	return s, connects, err
}
