// Portcullis enforces Kubernetes NetworkPolicy on a node, whatever its CNI, and
// says why each connection was let in or turned away.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(runAs(ctx, calledAs(os.Args[0]), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// calledAs gives the words by which the binary is called: kubectl runs its
// plugins, executables named kubectl-NAME, as "kubectl NAME".
func calledAs(path string) string {
	if filepath.Base(path) == "kubectl-portcullis" {
		return "kubectl portcullis"
	}
	return "portcullis"
}

// run is runAs for the binary under its own name.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return runAs(ctx, "portcullis", args, stdin, stdout, stderr)
}

// runAs executes the command line and gives the exit code. Whatever goes wrong
// is one line on stderr, which begins with name, as usage lines do.
func runAs(ctx context.Context, name string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCmd()
	rename(root, name)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := 1
	var exit exitError
	if errors.As(err, &exit) {
		code, err = exit.code, exit.err
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %s\n", name, oneLine(err))
	}
	return code
}

// rename has usage lines and examples say by which words the binary is called.
func rename(root *cobra.Command, name string) {
	root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: name}
	for _, cmd := range root.Commands() {
		cmd.Example = strings.ReplaceAll(cmd.Example, "portcullis ", name+" ")
	}
}

// outlivePipes makes writing to a standard output or error whose reader has
// gone an error like any other, until the returned function is called. Without
// it the Go runtime ends the process by SIGPIPE, as is fit for a filter but not
// for what has a gate to keep or namespaces to take away. The signal is caught,
// not ignored: ignoring would be inherited by the commands that are run.
func outlivePipes() (stop func()) {
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, syscall.SIGPIPE)
	return func() { signal.Stop(broken) }
}

// oneLine writes an error on one line: joined errors are separated by "; ". What a
// terminal would obey instead of showing it, which an error may quote from anywhere,
// is escaped.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	var b strings.Builder
	for _, r := range strings.Join(lines, "; ") {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
	}
	return b.String()
}

// exitError asks for an exit code other than 1. With err nil there is nothing
// left to say.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e exitError) Unwrap() error { return e.err }

func newRootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:   "portcullis",
		Short: "Enforce Kubernetes NetworkPolicy on any node, and explain every verdict",
		Long: `Portcullis enforces Kubernetes NetworkPolicy on a node, whatever its CNI, and
says why each connection was let in or turned away.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(
		newAgentCmd(),
		newCleanupCmd(),
		newDemoCmd(),
		newDiffCmd(),
		newExplainCmd(),
		newMatrixCmd(),
		newProbeCmd(),
		newObserveCmd(),
		newReplayCmd(),
		newSuggestCmd(),
		newTestCmd(),
		newTopCmd(),
		newVersionCmd(),
	)
	return root
}
