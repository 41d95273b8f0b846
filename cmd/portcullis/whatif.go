package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portcullis/policycache/manifest"
	"portcullis/policycache/whatif"
)

// cannotAnswer gives an error the exit code 2: that of a what-if question which
// has no answer, for 1 is an answer.
func cannotAnswer(err error) error {
	var exit exitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	return exitError{code: 2, err: err}
}

// answerable gives every error of a command the exit code 2, those about its
// flags included, unless the command asks for another.
func answerable(cmd *cobra.Command) *cobra.Command {
	run, args := cmd.RunE, cmd.Args
	cmd.RunE = func(cmd *cobra.Command, words []string) error {
		dieOnSignals()
		return cannotAnswer(run(cmd, words))
	}
	cmd.Args = func(cmd *cobra.Command, words []string) error { return cannotAnswer(args(cmd, words)) }
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return cannotAnswer(err) })
	return cmd
}

// whatIfFlags are the flags that replay and suggest have in common.
type whatIfFlags struct {
	cluster clusterFlags
	logs    []string
}

func (o *whatIfFlags) register(f *pflag.FlagSet) {
	o.cluster.register(f)
	f.StringArrayVar(&o.logs, "log", nil, "decision log, which may be compressed with gzip; - is standard input; may be given more than once")
}

func (o *whatIfFlags) check() error {
	if len(o.logs) == 0 {
		return errors.New("give --log FILE, or --log - for standard input")
	}
	return o.cluster.check()
}

// loadState reads the cluster's state; with policies, a directory or file of
// manifests, it has the policies of those instead of its own. What is wrong
// with a policy or a pod is a line of warnings.
func loadState(ctx context.Context, warnings io.Writer, from *clusterFlags, policies string) (*whatif.State, error) {
	objects, _, err := from.read(ctx)
	if err != nil {
		return nil, err
	}
	if policies != "" {
		others, err := manifest.Load(policies)
		if err != nil {
			return nil, err
		}
		state := *objects
		state.Policies = others.Policies
		objects = &state
	}
	state := whatif.NewState(objects, "")
	warnProblems(warnings, state)
	return state, nil
}

func warnProblems(w io.Writer, state *whatif.State) {
	for _, p := range state.Problems() {
		fmt.Fprintf(w, "warning: %s: %s\n", p.Object, oneLine(p.Err))
	}
}

// mostComplaints is how many bad lines of a log are named; the others are
// counted.
const mostComplaints = 10

// read hands the logs' records to use. Lines that are none are complained of,
// with file and number, and counted.
func (o *whatIfFlags) read(cmd *cobra.Command, use func(*whatif.Record)) (bad int, err error) {
	var missing uint64
	for _, name := range o.logs {
		lacks, err := readLog(cmd.InOrStdin(), name, use, func(line int, err error) {
			if bad++; bad <= mostComplaints {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s:%d: %s\n", name, line, oneLine(err))
			}
		})
		if err != nil {
			return bad, err
		}
		missing += lacks
	}
	if missing > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: the log says that it lacks %d decisions: what they were isn't known here\n", missing)
	}
	return bad, nil
}

func readLog(stdin io.Reader, name string, use func(*whatif.Record), complain func(int, error)) (missing uint64, err error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return 0, fmt.Errorf("opening the log: %w", err)
		}
		defer f.Close()
		in = f
	}
	buffered := bufio.NewReader(in)
	in = buffered
	// A log that was rotated is compressed, whatever its name.
	if magic, _ := buffered.Peek(2); string(magic) == "\x1f\x8b" {
		plain, err := gzip.NewReader(buffered)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		in = plain
	}
	if missing, err = whatif.Read(in, use, complain); err != nil {
		return missing, fmt.Errorf("%s: %w", name, err)
	}
	return missing, nil
}

// badLines is the error of a log with lines that are no records.
func badLines(bad int) error {
	if bad == 0 {
		return nil
	}
	return exitError{code: 2, err: fmt.Errorf("lines of the log that can't be read: %d", bad)}
}
