package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"portcullis/policycache/live"
)

const (
	// mergeHold is for how long a record waits for earlier ones of other nodes.
	mergeHold = 300 * time.Millisecond
	// gatherFor is for how long the last decisions of all agents are waited for before those
	// that come are shown.
	gatherFor = 5 * time.Second
	showEvery = 50 * time.Millisecond
)

// observer makes one stream of those of several agents. One goroutine per agent reads and
// filters; one puts together and writes.
type observer struct {
	*observeOptions
	fleet    *fleet
	show     *show
	troubles *troubles
	started  time.Time
	patience time.Duration // for the last decisions of all agents
	events   chan observation
	latest   latest
}

// observation is what an agent's reader has to say: a record, that all from before the
// question have been told, or that the agent gave no answer.
type observation struct {
	agent            agentSource
	record           *live.Record
	old              bool // the record is from before the question
	caughtUp, failed bool
}

// latest remembers of which time the last record of each node was shown.
type latest struct {
	mu sync.Mutex
	at map[string]time.Time
}

func (l *latest) note(name string, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at.After(l.at[name]) {
		l.at[name] = at
	}
}

func (l *latest) of(name string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.at[name]
}

func newObserver(o *observeOptions, f *fleet, s *show, t *troubles) *observer {
	patience := agentTimeout
	if o.follow {
		patience = gatherFor
	}
	return &observer{observeOptions: o, fleet: f, show: s, troubles: t, started: time.Now(), patience: patience,
		events: make(chan observation, 64), latest: latest{at: map[string]time.Time{}}}
}

func (o *observer) run(ctx context.Context) error {
	agents, err := o.fleet.list(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var readers sync.WaitGroup
	defer func() { cancel(nil); readers.Wait() }()
	first := map[string]bool{}
	for _, a := range agents {
		first[a.key()] = true
	}
	talk := o.talk(first)
	readers.Go(func() {
		if o.follow {
			o.fleet.follow(ctx, agents, talk, o.troubles)
			return
		}
		o.ask(ctx, agents, talk)
	})
	history, since, failed := o.gather(ctx, len(agents))
	switch {
	case ctx.Err() != nil:
		return nil
	case failed == len(agents):
		cancel(errNoAnswer)
		readers.Wait() // each says why it has no answer
		return exitError{code: 1}
	}
	if err := o.tellHistory(history); err != nil {
		return err
	}
	if o.follow {
		return o.tell(ctx, since, len(agents) > 1)
	}
	if failed > 0 {
		cancel(errNoAnswer)
		return exitError{code: 2, err: fmt.Errorf("of %d agents %d gave no answer", len(agents), failed)}
	}
	return nil
}

var errNoAnswer = errors.New("it gave no answer in time")

// ask has run talk to each agent once, and tells what goes wrong. An agent's error may
// be told after the wait for all answers is over, so an end of ctx doesn't silence it.
func (o *observer) ask(ctx context.Context, agents []agentSource, talk func(context.Context, agentSource) error) {
	var all sync.WaitGroup
	for _, a := range agents {
		all.Go(func() {
			err := talk(ctx, a)
			if errors.Is(err, context.Canceled) {
				err = context.Cause(ctx)
			}
			if err != nil && !errors.Is(err, context.Canceled) {
				o.troubles.tell(a.name(), err)
			}
		})
	}
	all.Wait()
}

// talk gives the function that reads an agent's decisions. Those of first are asked for
// the last ones at their first time; later, and of others, what hasn't been shown.
func (o *observer) talk(first map[string]bool) func(context.Context, agentSource) error {
	var mu sync.Mutex
	return func(ctx context.Context, a agentSource) error {
		mu.Lock()
		isFirst := first[a.key()]
		delete(first, a.key())
		mu.Unlock()
		var since time.Time
		if !isFirst {
			if since = o.latest.of(a.name()); since.IsZero() {
				since = o.started
			}
		}
		say := func(e observation) error {
			select {
			case o.events <- e:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		caughtUp := false
		err := a.decisions(ctx, decisionQuery{o.follow, o.remote(since)}, func(line []byte, old bool) error {
			r, err := live.Parse(line)
			if err != nil {
				return err
			}
			if !o.filter.Match(r) || old && !since.IsZero() && !r.Time.After(since) {
				return nil
			}
			return say(observation{agent: a, record: r, old: old && isFirst})
		}, func() {
			caughtUp = true
			o.troubles.over(a.name())
			say(observation{agent: a, caughtUp: isFirst}) // an error is that ctx has ended
		})
		if !caughtUp && isFirst {
			say(observation{agent: a, failed: true})
		}
		return err
	}
}

// gather takes in the last decisions of all agents, and what comes while it waits for
// them. Whoever has said nothing in time has failed, unless all are followed on.
func (o *observer) gather(ctx context.Context, agents int) (history, since []*live.Record, failed int) {
	enough := time.After(o.patience)
	for waiting := agents; waiting > 0; {
		select {
		case <-ctx.Done():
			return nil, nil, 0
		case <-enough:
			if !o.follow {
				failed += waiting
			}
			return history, since, failed
		case e := <-o.events:
			switch {
			case e.caughtUp:
				waiting--
			case e.failed:
				waiting--
				failed++
			case e.record == nil:
			case e.old:
				o.latest.note(e.agent.name(), e.record.Time)
				history = append(history, e.record)
			default:
				o.latest.note(e.agent.name(), e.record.Time)
				since = append(since, e.record)
			}
		}
	}
	return history, since, failed
}

func (o *observer) tellHistory(history []*live.Record) error {
	slices.SortStableFunc(history, func(a, b *live.Record) int { return a.Time.Compare(b.Time) })
	for _, r := range history[max(0, len(history)-o.last):] {
		if err := o.show.record(r); err != nil {
			return err
		}
	}
	return o.show.caughtUp()
}

// tell shows what comes until ctx ends, in the order of time as far as it can be had
// without much waiting.
func (o *observer) tell(ctx context.Context, since []*live.Record, several bool) error {
	var merge live.Merge
	if several {
		merge.Hold = mergeHold
	}
	for _, r := range since {
		merge.Add(r, time.Now())
	}
	tick := time.NewTicker(showEvery)
	defer tick.Stop()
	for {
		for _, r := range merge.Ready(time.Now()) {
			if err := o.show.record(r); err != nil {
				return err
			}
		}
		if len(o.events) == 0 {
			if err := o.show.w.Flush(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case e := <-o.events:
			if e.record != nil {
				o.latest.note(e.agent.name(), e.record.Time)
				merge.Add(e.record, time.Now())
			}
		}
	}
}
