package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"portcullis/policycache/whatif"
)

const suggestLong = `Suggest writes NetworkPolicies that admit what a decision log saw allowed, and
nothing else: one for each workload, that is for the pods of a namespace with
the same labels (but for those by which controllers tell pods and revisions
apart). Peers are workloads, or addresses outside; ports are protocols and
numbers. A comment at each rule is its evidence.

A policy isolates in the directions in which the log judged the workload, and so
denies there what the log didn't see: let the log run long enough to have seen
everything. An agent logs all connections of pods that some policy isolates, and
with --record all those of the others too. Workloads of which the log holds no
connection of either kind get a suggestion only with --complete, which says that
the log holds all connections of all pods.

The policies are meant in place of those in force. "portcullis replay" with them
as --policies tells what they would have done.

The exit code is 2 if the log couldn't be read, or not all of its lines.`

// newSuggestCmd makes the command that writes policies by a log's evidence.
func newSuggestCmd() *cobra.Command {
	var o whatIfFlags
	var options whatif.SuggestOptions
	cmd := &cobra.Command{
		Use:   "suggest --log FILE|- [--manifests DIR] [-n NAMESPACE]",
		Short: "Write policies that admit what a decision log saw, and nothing else",
		Long:  suggestLong,
		Example: `  portcullis suggest --log decisions.jsonl --manifests cluster/ > suggested.yaml
  portcullis suggest --log decisions.jsonl -n shop --complete`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			if err := checkPrefixes(&options); err != nil {
				return err
			}
			state, err := loadState(cmd.Context(), cmd.ErrOrStderr(), &o.cluster, "")
			if err != nil {
				return err
			}
			suggest := whatif.NewSuggest(state, options)
			bad, err := o.read(cmd, suggest.Add)
			if err != nil {
				return err
			}
			if err := unlessClosed(whatif.WriteYAML(cmd.OutOrStdout(), suggest.Policies())); err != nil {
				return err
			}
			noteSuggested(cmd.ErrOrStderr(), suggest.Report())
			return badLines(bad)
		},
	}
	f := cmd.Flags()
	o.register(f)
	f.StringVarP(&options.Namespace, "namespace", "n", "", "suggest for workloads of this namespace only")
	f.BoolVar(&options.Complete, "complete", false, "the log holds all connections: suggest for workloads that no policy isolates, too")
	f.IntVar(&options.Bits4, "ipv4-prefix", 32, "widen external IPv4 addresses to prefixes of this length")
	f.IntVar(&options.Bits6, "ipv6-prefix", 128, "widen external IPv6 addresses to prefixes of this length")
	return answerable(cmd)
}

func checkPrefixes(o *whatif.SuggestOptions) error {
	if o.Bits4 < 0 || o.Bits4 > 32 {
		return fmt.Errorf("--ipv4-prefix must be 0 to 32, not %d", o.Bits4)
	}
	if o.Bits6 < 0 || o.Bits6 > 128 {
		return fmt.Errorf("--ipv6-prefix must be 0 to 128, not %d", o.Bits6)
	}
	return nil
}

// noteSuggested says in a line each what of the log the suggestions lack.
func noteSuggested(w io.Writer, r *whatif.SuggestReport) {
	switch n := len(r.Unisolated); {
	case n == 1:
		fmt.Fprintf(w, "note: nothing is suggested for %s: no policy isolates it, so the log may lack connections of it; --complete says that it doesn't\n", r.Unisolated[0])
	case n > 1:
		fmt.Fprintf(w, "note: nothing is suggested for %s and %d more: no policy isolates them, so the log may lack connections of theirs; --complete says that it doesn't\n", r.Unisolated[0], n-1)
	}
	if r.Inadmissible > 0 {
		fmt.Fprintf(w, "note: connections that were allowed and that no rule can admit (incomplete packets, port 0): %d\n", r.Inadmissible)
	}
	for i, p := range r.NotPlaced {
		if i == mostComplaints {
			fmt.Fprintf(w, "note: and for %d other reasons\n", len(r.NotPlaced)-i)
			break
		}
		fmt.Fprintf(w, "note: connections that are no evidence: %d, %s\n", p.Connections, p.Why)
	}
}
