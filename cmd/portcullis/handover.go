package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"portcullis/filter"
)

const (
	// handoverLook is how often an agent looks whether another has taken over.
	handoverLook = 100 * time.Millisecond
	// drainTime bounds how long the queues' last packets are waited for.
	drainTime = 5 * time.Second
	// standbyPatience is how long a gate must be without an agent before one that
	// stands by takes it back: time for the one that had it to be started again.
	standbyPatience = 10 * time.Second
)

// runAgent enforces until ctx ends or a newer agent has taken over. With standby it
// then waits, and enforces anew if that agent ends and nobody comes in its place.
func runAgent(ctx context.Context, o *agentOptions, stdout io.Writer, log *slog.Logger) error {
	// While it stands by, SIGHUP has nothing to reopen and must not end it either.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		err := enforce(ctx, o, stdout, log)
		handed := new(handedOver)
		if !errors.As(err, &handed) {
			return err
		}
		if !o.standby {
			return errors.Join(handed.trouble, handed.kernel.Leave())
		}
		if handed.trouble != nil {
			log.Error("handing over left something undone", "err", oneLine(handed.trouble))
		}
		if !standBy(ctx, handed.kernel, log) {
			return nil
		}
	}
}

// handedOver is how enforce ends when a newer agent has taken over.
type handedOver struct {
	kernel  *filter.Kernel // still holds this agent's place
	trouble error
}

func (h *handedOver) Error() string { return "handed over to a newer agent" }

// standBy waits until nobody has enforced for a while, and gives false if ctx ends
// before.
func standBy(ctx context.Context, kernel *filter.Kernel, log *slog.Logger) bool {
	defer kernel.Leave()
	if err := kernel.Resign(); err != nil {
		log.Error("can't tell other agents that this one stands by", "err", oneLine(err))
	}
	log.Info("standing by")
	tick := time.NewTicker(handoverLook)
	defer tick.Stop()
	owned := time.Now()
	for {
		select {
		case <-ctx.Done():
			log.Info("stopped standing by")
			return false
		case <-tick.C:
		}
		if filter.Owned() {
			owned = time.Now()
		}
		if time.Since(owned) > standbyPatience {
			log.Warn("the agent that had taken over is gone, and no other has come: taking the gate back")
			return true
		}
	}
}

// watchSuccessor ends the agent by cancel when a newer one has taken over.
func (a *agent) watchSuccessor(ctx context.Context, cancel context.CancelFunc) {
	tick := time.NewTicker(handoverLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if a.kernel.Superseded() {
			cancel()
			return
		}
	}
}

// superseded tells, at the end, whether another agent has the gate now. One that is
// just taking it is waited for: it needs this one's queues until it is done.
func (a *agent) superseded() bool {
	superseded, err := a.kernel.Settled()
	if err != nil {
		a.log.Error("can't tell whether another agent has taken over", "err", oneLine(err))
	}
	return superseded
}

// drain waits for the verdicts of the last packets that were queued to this agent,
// and has what is logged about them go to the decision log's file of this name,
// which a newer agent may have renamed.
func (a *agent) drain() error {
	var errs []error
	if waiting := a.queues.Drain(drainTime); waiting > 0 {
		errs = append(errs, fmt.Errorf("%d packets still had no verdict after %s and were dropped", waiting, drainTime))
	}
	if a.logFile != nil {
		errs = append(errs, a.logFile.Reopen())
	}
	return errors.Join(errs...)
}
