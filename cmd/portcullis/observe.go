package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/client-go/util/jsonpath"

	"portcullis/policycache/live"
)

const observeLong = `Observe shows decisions as the agents make them: those of this node's agent by its
Unix socket, or where there is none, or with --kubeconfig or --context, those of all
nodes' agents by way of the API server. It runs this program in the agents' pods as
kubectl exec does, so that whoever may create pods/exec there may observe, and no port
is open for it anywhere. A node that can't be reached is named on standard error; the
others go on. With --follow an agent that was replaced is found again.

A denial is shown at once and each time, whatever the decision log gathers, selects or
samples: this is what is judged, not what is kept. An agent remembers its last 2,048
decisions. Only connections of pods that some policy isolates are judged at all; others
are shown if the agent runs with --record all.

Of the filters all must hold, and of one that is given several times any. A pod is
NAMESPACE/POD or POD, or its workload's name; shell patterns are understood. An end
may be an address, a CIDR or a node's name as well.`

// observeOptions are the flags of observe.
type observeOptions struct {
	agents   agentFlags
	follow   bool
	last     int
	criteria live.Criteria
	output   string
	filter   *live.Filter
}

// newObserveCmd makes the command that shows decisions. It exits with 0, with 1 if there
// is no answer, and with 2 if there is none from some of the agents.
func newObserveCmd() *cobra.Command {
	var o observeOptions
	cmd := &cobra.Command{
		Use:   "observe [-f] [--last N] [--from END] [--to END] [--verdict deny]",
		Short: "Show decisions as they are made, on this node or on all",
		Long:  observeLong,
		Example: `  portcullis observe -f --verdict deny
  portcullis observe --to shop/db --port 5432 --since 10m
  portcullis observe -f --policy shop/db -o jsonpath='{.src.pod} {.verdict}'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(cmd.Flags()); err != nil {
				return err
			}
			show, err := newShow(cmd.OutOrStdout(), o.output)
			if err != nil {
				return err
			}
			show.marks = o.agents.untilEOF
			fleet, err := o.agents.open()
			if err != nil {
				return err
			}
			ctx, cancel := o.agents.untilInputEnds(cmd.Context(), cmd.InOrStdin())
			defer cancel()
			return unlessClosed(newObserver(&o, fleet, show, newTroubles(cmd.ErrOrStderr())).run(ctx))
		},
	}
	f := cmd.Flags()
	o.agents.register(f)
	f.BoolVarP(&o.follow, "follow", "f", false, "go on with the decisions that come")
	f.IntVar(&o.last, "last", 20, "how many of the last decisions that match are shown; with --since all, if it isn't given")
	f.StringVarP(&o.output, "output", "o", "text", "text, json (the decision log's lines) or jsonpath=TEMPLATE")
	o.registerCriteria(f)
	return cmd
}

// filterFlags are those that say which decisions are shown.
var filterFlags = []string{"namespace", "pod", "from", "to", "verdict", "port", "policy", "since"}

func (o *observeOptions) registerCriteria(f *pflag.FlagSet) {
	c := &o.criteria
	f.StringSliceVarP(&c.Namespace, "namespace", "n", nil, "namespace of either end")
	f.StringSliceVar(&c.Pod, "pod", nil, "either end")
	f.StringSliceVar(&c.From, "from", nil, "source")
	f.StringSliceVar(&c.To, "to", nil, "destination")
	f.StringSliceVar(&c.Verdict, "verdict", nil, "verdict, such as deny or allow")
	f.StringSliceVar(&c.Port, "port", nil, "destination port")
	f.StringSliceVar(&c.Policy, "policy", nil, "policy that isolates or admits: NAMESPACE/NAME or NAME")
	f.StringVar(&c.Since, "since", "", "how long ago, such as 5m, or a time such as 2026-01-02T15:04:05Z")
}

func (o *observeOptions) check(f *pflag.FlagSet) (err error) {
	if err := o.agents.check(f); err != nil {
		return err
	}
	if o.last < 0 {
		return fmt.Errorf("--last %d is below zero", o.last)
	}
	if o.criteria.Since != "" && !f.Changed("last") {
		o.last = allLast
	}
	o.filter, err = live.NewFilter(o.criteria, time.Now())
	return err
}

// allLast is more than any agent remembers.
const allLast = 1 << 30

// remote gives the flags that have an agent's node filter by itself. A duration means
// the same there; clocks may differ.
func (o *observeOptions) remote(since time.Time) []string {
	c := &o.criteria
	flags := []string{"--last", strconv.Itoa(o.last)}
	for i, values := range [][]string{c.Namespace, c.Pod, c.From, c.To, c.Verdict, c.Port, c.Policy} {
		for _, v := range values {
			flags = append(flags, "--"+filterFlags[i], v)
		}
	}
	switch {
	case !since.IsZero():
		flags[1] = strconv.Itoa(allLast)
		flags = append(flags, "--since", since.UTC().Format(time.RFC3339Nano))
	case c.Since != "":
		flags = append(flags, "--since", c.Since)
	}
	return flags
}

// show writes records.
type show struct {
	w        *bufio.Writer
	colour   bool
	template *jsonpath.JSONPath
	json     bool
	marks    bool // whoever reads wants to know where the last decisions end
}

func newShow(w io.Writer, output string) (*show, error) {
	s := &show{w: bufio.NewWriterSize(w, 64<<10), json: output == "json"}
	switch template, is := strings.CutPrefix(output, "jsonpath="); {
	case is:
		s.template = jsonpath.New("output").AllowMissingKeys(true)
		if !strings.Contains(template, "{") {
			template = "{" + template + "}"
		}
		if err := s.template.Parse(template); err != nil {
			return nil, fmt.Errorf("-o jsonpath: %w", err)
		}
	case output == "text":
		s.colour = colours(w)
	case output != "json":
		return nil, fmt.Errorf("unknown output %q: want text, json or jsonpath=TEMPLATE", output)
	}
	return s, nil
}

// colours tells whether w is a terminal whose user hasn't asked for none (no-color.org).
func colours(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd()) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// record writes a record; Flush hands it on.
func (s *show) record(r *live.Record) error {
	switch {
	case s.template != nil:
		var v any
		if err := json.Unmarshal(r.Line, &v); err != nil {
			return err
		}
		var b strings.Builder
		if err := s.template.Execute(&b, v); err != nil {
			return fmt.Errorf("-o jsonpath: %w", err)
		}
		_, err := fmt.Fprintln(s.w, b.String())
		return err
	case s.json:
		_, err := s.w.Write(append(r.Line, '\n'))
		return err
	}
	_, err := fmt.Fprintln(s.w, r.Text(s.colour, time.Local))
	return err
}

// caughtUp says that the last decisions have been told, if that is asked for.
func (s *show) caughtUp() error {
	if s.marks {
		fmt.Fprintln(s.w, nowLine) // whose error Flush gives
	}
	return s.w.Flush()
}
