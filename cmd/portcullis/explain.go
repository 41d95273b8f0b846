package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"portcullis/policycache"
	"portcullis/policycache/explain"
)

// explainOptions are the flags of explain.
type explainOptions struct {
	cluster     clusterFlags
	agent       string
	namespace   string
	output      string
	connections string
	query       explain.Query
}

const explainLong = `Explain says whether a connection may be made, and which policies decide it.
It answers from the same compiled policy that the agent uses, judges both ends
wherever they run, and never touches the kernel. The cluster is the one that
kubectl would talk to, or the one in the directory of --manifests. With --agent this
node's agent answers by the policy that it has in force: of pods of other nodes it
doesn't know whether they are isolated, and says so.

Where a connection is denied for want of a rule, the smallest change is named that would
admit it, as far as one does.

An end is NS/POD, POD (in the namespace of -n) or an IP. An IP that a pod owns
is that pod; any other is outside the cluster. Two pods are connected over the
first IP family of the destination that the source has too. ICMP stands for an
echo request (ping), which has no port.

With --connections, each line of the file is a question such as
  {"from":"default/web","to":"shop/db","protocol":"TCP","port":5432}
and is answered by one line of JSON, in order. A line that can't be answered
yields {"line":N,"error":"..."}, and the exit code is 2.`

// newExplainCmd makes the command that says whether a connection may be made,
// and why. It exits with 0 whatever the verdict, with 1 if the question can't
// be answered, and with 2 if some line of a batch can't.
func newExplainCmd() *cobra.Command {
	var o explainOptions
	cmd := &cobra.Command{
		Use:   "explain [--manifests DIR] (--from NS/POD|IP --to NS/POD|IP --port N|NAME | --connections FILE|-)",
		Short: "Say whether a connection may be made, and which policies decide it",
		Long:  explainLong,
		Example: `  portcullis explain --manifests cluster/ --from web --to shop/db --port 5432
  portcullis explain --manifests cluster/ --from 203.0.113.9 --to shop/web --port http -o json
  portcullis explain --manifests cluster/ --from web --to shop/db --protocol icmp
  portcullis explain --manifests cluster/ --connections - < connections.jsonl`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dieOnSignals()
			if err := o.check(cmd); err != nil {
				return err
			}
			if o.agent != "" {
				return o.askAgent(cmd)
			}
			c, err := loadCluster(cmd.Context(), cmd.ErrOrStderr(), &o.cluster, o.namespace)
			if err != nil {
				return err
			}
			if o.connections != "" {
				return o.batch(cmd, c)
			}
			return o.single(cmd.OutOrStdout(), c)
		},
	}
	f := cmd.Flags()
	o.cluster.register(f)
	registerAgent(f, &o.agent)
	f.StringVar(&o.query.From, "from", "", "source: NS/POD, POD or an IP")
	f.StringVar(&o.query.To, "to", "", "destination: NS/POD, POD or an IP")
	f.StringVar(&o.query.Port, "port", "", "destination port: a number, or a name that the destination pod gives one")
	f.StringVar(&o.query.Protocol, "protocol", "TCP", "TCP, UDP, SCTP or ICMP")
	f.StringVarP(&o.namespace, "namespace", "n", "", "namespace of pods that are named without one (default the kubeconfig context's, or \"default\")")
	f.StringVarP(&o.output, "output", "o", "text", "text or json")
	f.StringVar(&o.connections, "connections", "", "file of connections to explain, one JSON object a line; - is standard input")
	return cmd
}

// check refuses flags that are missing or contradict each other.
func (o *explainOptions) check(cmd *cobra.Command) error {
	if err := checkCommon(&o.cluster, o.output); err != nil {
		return err
	}
	if err := checkAgent(o.agent, &o.cluster); err != nil {
		return err
	}
	if !cmd.Flags().Changed("connections") {
		if o.query.From == "" || o.query.To == "" {
			return errors.New("give --from and --to, or --connections")
		}
		return nil
	}
	if o.connections == "" {
		return errors.New("--connections needs a file, or - for standard input")
	}
	for _, name := range []string{"from", "to", "port", "protocol"} {
		if cmd.Flags().Changed(name) {
			return fmt.Errorf("--connections and --%s exclude each other", name)
		}
	}
	if cmd.Flags().Changed("output") && o.output != "json" {
		return errors.New("--connections is always answered in JSON lines: leave out -o text")
	}
	return nil
}

// checkCommon checks the flags that explain and matrix have in common.
func checkCommon(cluster *clusterFlags, output string) error {
	if err := cluster.check(); err != nil {
		return err
	}
	if output != "text" && output != "json" {
		return fmt.Errorf("unknown output %q: want text or json", output)
	}
	return nil
}

// dieOnSignals lets SIGINT and SIGTERM end the process at once, as is fit for a
// command that has nothing to undo and may be waiting for its input.
func dieOnSignals() { signal.Reset(syscall.SIGINT, syscall.SIGTERM) }

// loadCluster reads the cluster's state and compiles its policy for no
// particular node, so that every pod is judged. Pods that are named without a
// namespace are in the given one; when that is empty, in the one of the
// kubeconfig's context, as kubectl has it. What is wrong with a policy or a pod
// is a line of warnings; the rest is answered all the same.
func loadCluster(ctx context.Context, warnings io.Writer, from *clusterFlags, namespace string) (*explain.Cluster, error) {
	objects, contextNamespace, err := from.read(ctx)
	if err != nil {
		return nil, err
	}
	if namespace == "" {
		namespace = contextNamespace
	}
	compiler := policycache.NewCompiler("", slog.New(slog.DiscardHandler))
	snapshot := compiler.Compile(objects)
	for _, p := range compiler.Problems() {
		fmt.Fprintf(warnings, "warning: %s: %s\n", p.Object, oneLine(p.Err))
	}
	return explain.New(objects, snapshot, namespace), nil
}

func (o *explainOptions) single(out io.Writer, c *explain.Cluster) error {
	return writeAnswer(out, c, o.query, o.output)
}

// writeAnswer answers one question, in JSON or for people.
func writeAnswer(out io.Writer, c *explain.Cluster, q explain.Query, output string) error {
	if output == "json" {
		a, err := c.Ask(q)
		if err != nil {
			return suggest(c, err)
		}
		return unlessClosed(c.WriteJSON(out, &a))
	}
	answers, err := c.AskAll(q)
	if err != nil {
		return suggest(c, err)
	}
	return unlessClosed(c.WriteText(out, answers))
}

// suggest adds to an error about an unknown pod the pods that may be meant.
func suggest(c *explain.Cluster, err error) error {
	var unknown *explain.UnknownPodError
	if !errors.As(err, &unknown) {
		return err
	}
	near := c.Near(unknown.Key)
	if len(near) == 0 {
		return err
	}
	return fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
}

func (o *explainOptions) batch(cmd *cobra.Command, c *explain.Cluster) error {
	in := cmd.InOrStdin()
	if o.connections != "-" {
		f, err := os.Open(o.connections)
		if err != nil {
			return fmt.Errorf("opening connections: %w", err)
		}
		defer f.Close()
		in = f
	}
	return batchOutcome(c.Batch(in, cmd.OutOrStdout()))
}

// unlessClosed passes over the error of writing to a pipe whose reader has had
// enough, such as head.
func unlessClosed(err error) error {
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe) {
		return nil
	}
	return err
}
