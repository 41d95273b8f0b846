package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"portcullis/bench/demo"
	"portcullis/bench/lab"
)

const demoLong = `Demo builds a small shop out of network namespaces: a frontend, an api and a
database, a stranger in another Kubernetes namespace, and hosts outside. It runs
the agent on their node, applies one policy after the other, and shows each time
what really connects beside what explain says, and what the decision log tells.

It needs root, ends by itself in less than a minute and takes everything away
that it made; the machine's own network is never touched. The exit code is 1 if
what is shown side by side differs anywhere, or something can't be done.`

func newDemoCmd() *cobra.Command {
	var (
		o    demo.Options
		mode string
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show policies at work on a small shop in network namespaces (needs root)",
		Long:  demoLong,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			switch mode {
			case "routed":
				o.Mode = lab.Routed
			case "bridged":
				o.Mode = lab.Bridged
			default:
				return fmt.Errorf("--mode is routed or bridged, not %q", mode)
			}
			if o.Binary, err = os.Executable(); err != nil {
				return fmt.Errorf("find the program's own file, to run the agent from: %w", err)
			}
			o.Program = os.Args[0]
			o.Color = wantsColor(cmd.OutOrStdout(), os.Getenv)
			// A reader that goes away (portcullis demo | head) ends the demo by
			// an error of writing, so that it cleans up.
			defer outlivePipes()()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGHUP)
			defer stop()
			return unlessClosed(demo.Run(ctx, cmd.OutOrStdout(), o))
		},
	}
	f := cmd.Flags()
	f.StringVar(&mode, "mode", "routed", "how pods hang on the node: routed or bridged")
	f.StringVar(&o.Keep, "keep", "", "directory, new or empty, to leave the manifests in")
	f.BoolVarP(&o.Verbose, "verbose", "v", false, "show every decision, and the agent's own log")
	return cmd
}

// wantsColor tells whether colours are fit for a writer: it is a terminal that
// knows them, and NO_COLOR (no-color.org) isn't set.
func wantsColor(w io.Writer, getenv func(string) string) bool {
	f, ok := w.(*os.File)
	if !ok || getenv("NO_COLOR") != "" || getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
