package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portcullis/policycache"
	"portcullis/policycache/diff"
)

const diffLong = `Diff compares what this node's agent believes with what the API server says, or a
directory of manifests: policies, pods, namespaces and nodes as far as policy looks at
them. It compares the sets of isolated addresses in the node's kernel with whom those
objects isolate there, and says what is wrong with the rules. Each difference has the
time since when the node has it so.

Where there is no agent's socket, or with --all, the agents of all nodes are asked by way
of the API server: diff runs this program in their pods, as observe does.

A change on its way is no difference: what differs is looked at again after --settle,
and told if it still does.

The exit code is 0 if there is no difference, 1 if there is one, and 2 if the question
can't be answered.`

// diffOptions are the flags of diff.
type diffOptions struct {
	cluster   clusterFlags
	agent     string
	all       bool
	namespace string // of the agents
	settle    time.Duration
	output    string
}

// newDiffCmd makes the command that compares a node with the API.
func newDiffCmd() *cobra.Command {
	var o diffOptions
	cmd := &cobra.Command{
		Use:   "diff [--agent SOCKET | --all] [--manifests DIR | --kubeconfig FILE]",
		Short: "Compare what a node's agent believes and enforces with what the API says",
		Long:  diffLong,
		Example: `  portcullis diff
  kubectl portcullis diff --all
  kubectl -n portcullis exec daemonset/portcullis -- portcullis diff`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dieOnSignals()
			if err := checkCommon(&o.cluster, o.output); err != nil {
				return err
			}
			if o.settle < 0 {
				return fmt.Errorf("--settle %s is below zero", o.settle)
			}
			everywhere, err := o.everywhere(cmd.Flags())
			if err != nil {
				return err
			}
			if everywhere {
				return o.askAll(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			}
			state, differences, err := o.lasting(cmd.Context())
			if err != nil {
				return err
			}
			if err := o.write(cmd.OutOrStdout(), state, differences); err != nil {
				return unlessClosed(err)
			}
			if len(differences) > 0 {
				return exitError{code: 1}
			}
			return nil
		},
	}
	o.register(cmd.Flags())
	return answerable(cmd)
}

func (o *diffOptions) register(f *pflag.FlagSet) {
	o.cluster.register(f)
	f.StringVar(&o.agent, "agent", defaultSocket, "the agent's Unix socket")
	f.BoolVar(&o.all, "all", false, "ask all nodes' agents by way of the API server (default where there is no socket)")
	f.StringVar(&o.namespace, "agents-namespace", "portcullis", "namespace of the agents' pods")
	f.DurationVar(&o.settle, "settle", time.Second, "how long a difference must last to be told; 0 for not at all")
	f.StringVarP(&o.output, "output", "o", "text", "text or json")
}

// lasting compares, and if there are differences again.
func (o *diffOptions) lasting(ctx context.Context) (*diff.State, []diff.Difference, error) {
	state, before, err := o.compare(ctx)
	if err != nil || len(before) == 0 || o.settle == 0 {
		return state, before, err
	}
	time.Sleep(o.settle)
	state, now, err := o.compare(ctx)
	return state, diff.Lasting(before, now), err
}

func (o *diffOptions) compare(ctx context.Context) (*diff.State, []diff.Difference, error) {
	state := new(diff.State)
	if err := dialAgent(o.agent).read(ctx, "/v1/state", state); err != nil {
		return nil, nil, err
	}
	var objects *policycache.Objects
	objects, _, err := o.cluster.read(ctx)
	if err != nil {
		return nil, nil, err
	}
	return state, diff.Compare(state, objects), nil
}

func (o *diffOptions) write(w io.Writer, s *diff.State, differences []diff.Difference) error {
	if o.output == "json" {
		if differences == nil {
			differences = []diff.Difference{}
		}
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(map[string]any{"node": s.Node, "generation": s.Generation, "applied": s.Applied,
			"differences": differences, "repaired": append([]diff.Finding{}, s.Repaired...)})
	}
	p := &printer{w: w}
	p.line("node %s: policy generation %d, in force since %s; %d pods, %d policies", s.Node, s.Generation, when(s.Applied), len(s.Pods), len(s.Policies))
	for _, d := range differences {
		since := ""
		if !d.Since.IsZero() {
			since = ", since " + when(d.Since)
		}
		p.line("%-10s  %s: %s%s", d.Part, d.Object, d.What, since)
	}
	for _, f := range s.Repaired {
		p.line("repaired    %s, at %s", f.Text, when(f.Time))
	}
	switch n := len(differences); n {
	case 0:
		p.line("no difference")
	case 1:
		p.line("1 difference")
	default:
		p.line("%d differences", n)
	}
	return p.err
}

// printer keeps the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

func when(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }
