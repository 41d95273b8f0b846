package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"portcullis/policycache/live"
)

const topLong = `Top shows who is denied most, and by which policies, and how the agents are doing:
connections that they judge per second, how long that takes, and what waits in their
queues. Whom it asks, and by which right, is as with observe.

Denials are counted since the agent's start, by source, destination, port and
policies; of 4,096 kinds at once, and those that were seen the longest ago are
forgotten first.

On a terminal it goes on until q is pressed; s sorts otherwise. Else, or with --once, it
prints one table, of what happens within an interval.`

// topOptions are the flags of top.
type topOptions struct {
	agents   agentFlags
	interval time.Duration
	once     bool
	sort     string
	rows     int
	output   string
}

// newTopCmd makes the command that shows who is denied most. It exits with 0, and with 1
// if no agent answers.
func newTopCmd() *cobra.Command {
	var o topOptions
	cmd := &cobra.Command{
		Use:   "top [--sort count|rate|last|from|to|policy] [--once]",
		Short: "Show who is denied most, by which policy, and how the agents are doing",
		Long:  topLong,
		Example: `  portcullis top
  portcullis top --once --sort rate`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(cmd); err != nil {
				return err
			}
			fleet, err := o.agents.open()
			if err != nil {
				return err
			}
			ctx, cancel := o.agents.untilInputEnds(cmd.Context(), cmd.InOrStdin())
			defer cancel()
			return unlessClosed(o.run(ctx, fleet, cmd))
		},
	}
	f := cmd.Flags()
	o.agents.register(f)
	f.DurationVar(&o.interval, "interval", 2*time.Second, "how often the agents are asked")
	f.BoolVar(&o.once, "once", false, "print one table and end")
	f.StringVar(&o.sort, "sort", live.Sorts[0], "order of denials: "+strings.Join(live.Sorts, ", "))
	f.IntVar(&o.rows, "rows", 20, "how many kinds of denials a printed table has at most; 0 for all")
	f.StringVarP(&o.output, "output", "o", "text", "text, or json: the agents' figures, a line for each agent and interval")
	return cmd
}

func (o *topOptions) check(cmd *cobra.Command) error {
	switch {
	case o.agents.check(cmd.Flags()) != nil:
		return o.agents.check(cmd.Flags())
	case o.interval < 100*time.Millisecond:
		return fmt.Errorf("--interval %s: at least 100ms", o.interval)
	case !slices.Contains(live.Sorts, o.sort):
		return fmt.Errorf("--sort %q: want %s", o.sort, strings.Join(live.Sorts, ", "))
	case o.rows < 0:
		return fmt.Errorf("--rows %d is below zero", o.rows)
	case o.output != "text" && o.output != "json":
		return fmt.Errorf("unknown output %q: want text or json", o.output)
	}
	return nil
}

func (o *topOptions) run(ctx context.Context, f *fleet, cmd *cobra.Command) error {
	agents, err := f.list(ctx)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	terminal, isFile := out.(*os.File)
	switch {
	case o.once || o.output == "text" && !(isFile && isatty.IsTerminal(terminal.Fd())):
		return o.printOnce(ctx, agents, out, newTroubles(cmd.ErrOrStderr()))
	case o.output == "json":
		return o.printAll(ctx, f, agents, out, newTroubles(cmd.ErrOrStderr()))
	}
	return o.watch(ctx, f, agents, cmd.InOrStdin(), out)
}

// printOnce asks each agent twice and prints one table.
func (o *topOptions) printOnce(ctx context.Context, agents []agentSource, out io.Writer, troubles *troubles) error {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout+2*o.interval)
	defer cancel()
	var mu sync.Mutex
	top := live.NewTop()
	answered := 0
	var last []*live.Sample
	var all sync.WaitGroup
	for _, a := range agents {
		all.Go(func() {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			n := 0
			err := a.samples(ctx, o.interval, func(s *live.Sample) {
				mu.Lock()
				defer mu.Unlock()
				if n++; n <= 2 {
					top.Add(s)
				}
				if n == 2 {
					answered++
					last = append(last, s)
					cancel()
				}
			})
			if n < 2 && err != nil {
				troubles.tell(a.name(), err)
			}
		})
	}
	all.Wait()
	if answered == 0 {
		return exitError{code: 1} // each has been told why
	}
	if o.output == "json" {
		for _, s := range last {
			if err := json.NewEncoder(out).Encode(s); err != nil {
				return err
			}
		}
		return nil
	}
	_, err := io.WriteString(out, top.Page(o.sort, o.rows, time.Now(), time.Local))
	return err
}

// printAll prints each agent's figures as they come.
func (o *topOptions) printAll(ctx context.Context, f *fleet, agents []agentSource, out io.Writer, troubles *troubles) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	var failed error
	f.follow(ctx, agents, func(ctx context.Context, a agentSource) error {
		return a.samples(ctx, o.interval, func(s *live.Sample) {
			mu.Lock()
			defer mu.Unlock()
			troubles.over(a.name())
			if err := json.NewEncoder(out).Encode(s); err != nil && failed == nil {
				failed = err
				cancel()
			}
		})
	}, troubles)
	return failed
}
