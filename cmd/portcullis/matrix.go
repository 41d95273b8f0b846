package main

import (
	"fmt"
	"io"
	"net/url"

	"github.com/spf13/cobra"

	"portcullis/policycache/explain"
)

// newMatrixCmd makes the command that prints which pods may connect to which.
func newMatrixCmd() *cobra.Command {
	var cluster clusterFlags
	var port, protocol, namespace, output, agent string
	cmd := &cobra.Command{
		Use:   "matrix [--manifests DIR] --port N|NAME [--protocol P] [-n NAMESPACE]",
		Short: "Print the truth table of all pods against all pods",
		Long: `Matrix prints which pods may connect to which: a row for each source, a column
for each destination, judged as by explain. A port's name means what each
destination pod says. Pods that have finished, or have no address of their own,
are left out.`,
		Example: `  portcullis matrix --manifests cluster/ --port 80
  portcullis matrix --manifests cluster/ --protocol icmp -n shop -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dieOnSignals()
			if err := checkCommon(&cluster, output); err != nil {
				return err
			}
			if err := checkAgent(agent, &cluster); err != nil {
				return err
			}
			if agent != "" {
				return pageFrom(cmd, dialAgent(agent), "/v1/matrix",
					url.Values{"port": {port}, "protocol": {protocol}, "only": {namespace}, "output": {output}})
			}
			c, err := loadCluster(cmd.Context(), cmd.ErrOrStderr(), &cluster, "")
			if err != nil {
				return err
			}
			m, err := c.Matrix(protocol, port, namespace)
			if err != nil {
				return err
			}
			noteLeftOut(cmd.ErrOrStderr(), m.LeftOut())
			return writeMatrix(cmd.OutOrStdout(), m, output)
		},
	}
	f := cmd.Flags()
	cluster.register(f)
	registerAgent(f, &agent)
	f.StringVar(&port, "port", "", "destination port: a number, or a name that the destination pods give one")
	f.StringVar(&protocol, "protocol", "TCP", "TCP, UDP, SCTP or ICMP")
	f.StringVarP(&namespace, "namespace", "n", "", "show the pods of this namespace only")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func writeMatrix(w io.Writer, m *explain.Matrix, output string) error {
	if output == "json" {
		return unlessClosed(m.WriteJSON(w))
	}
	return unlessClosed(m.WriteText(w))
}

// noteLeftOut says in one line which pods the table lacks: the first, why it
// does, and how many more.
func noteLeftOut(w io.Writer, leftOut []error) {
	switch len(leftOut) {
	case 0:
	case 1:
		fmt.Fprintf(w, "note: left out: %s\n", leftOut[0])
	default:
		fmt.Fprintf(w, "note: left out: %s; and %d more\n", leftOut[0], len(leftOut)-1)
	}
}
