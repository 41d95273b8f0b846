package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"portcullis/policycache/whatif"
)

const replayLong = `Replay judges the connections of a decision log by another state of the cluster,
such as the policies of a merge request, and says which of them would change
verdict: by pair and port, with counts, and who decides then and now.

A pod is found by its name, whatever its address is now; if it has gone, another
pod of its workload stands for it. Other ends are their addresses. Of each
connection the directions are judged that the log says were judged, so that the
verdicts are comparable. With --policies, the state's own policies are replaced.

The exit code is 1 if a connection that was allowed would be denied, 0 if none
would, and 2 if the question can't be answered, or not for all lines of the log.`

// newReplayCmd makes the command that judges a decision log's connections by
// another state.
func newReplayCmd() *cobra.Command {
	var o whatIfFlags
	var policies, output string
	cmd := &cobra.Command{
		Use:   "replay --log FILE|- [--manifests DIR] [--policies PATH]",
		Short: "Say which logged connections other policies would judge otherwise",
		Long:  replayLong,
		Example: `  portcullis replay --log decisions.jsonl --manifests proposed/
  portcullis replay --log decisions.jsonl --policies policies/ -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			if err := checkCommon(&o.cluster, output); err != nil {
				return err
			}
			state, err := loadState(cmd.Context(), cmd.ErrOrStderr(), &o.cluster, policies)
			if err != nil {
				return err
			}
			replay := whatif.NewReplay(state)
			bad, err := o.read(cmd, replay.Add)
			if err != nil {
				return err
			}
			report := replay.Report()
			if err := writeReplay(cmd, report, output); err != nil {
				return err
			}
			return replayOutcome(report, bad)
		},
	}
	f := cmd.Flags()
	o.register(f)
	f.StringVar(&policies, "policies", "", "manifests whose policies are judged by, instead of the state's own")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	return answerable(cmd)
}

func writeReplay(cmd *cobra.Command, report *whatif.Report, output string) error {
	if output == "json" {
		return unlessClosed(report.WriteJSON(cmd.OutOrStdout()))
	}
	return unlessClosed(report.WriteText(cmd.OutOrStdout()))
}

// replayOutcome gives the exit code: a denial is one even if the log couldn't
// be read whole, and a log of which nothing could be judged answers nothing.
func replayOutcome(report *whatif.Report, bad int) error {
	switch {
	case report.Denied > 0 && bad > 0:
		return exitError{code: 1, err: fmt.Errorf("lines of the log that can't be read: %d", bad)}
	case report.Denied > 0:
		return exitError{code: 1}
	case bad > 0:
		return badLines(bad)
	case report.Judged() == 0:
		return errors.New("the log has no connection that could be judged")
	}
	return nil
}
