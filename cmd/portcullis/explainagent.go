package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// registerAgent adds the flag by which explain and matrix ask an agent.
func registerAgent(f *pflag.FlagSet, agent *string) {
	f.StringVar(agent, "agent", "", "Unix socket of this node's agent, whose own compiled policy answers, as "+defaultSocket)
}

// checkAgent refuses two sources of one answer.
func checkAgent(agent string, c *clusterFlags) error {
	if agent != "" && (c.manifests != "" || c.kubeconfig != "" || c.context != "") {
		return errors.New("--agent excludes --manifests, --kubeconfig and --context: the agent answers by what it has")
	}
	return nil
}

// noteAgent says what an agent's answer is worth.
func noteAgent(w io.Writer, h http.Header) {
	fmt.Fprintf(w, "note: as the agent of node %s has it, generation %s: it judges the pods of its node, and doesn't know who is isolated on others\n",
		h.Get(nodeHeader), h.Get(generationHeader))
}

// askAgent has the agent answer the question, or the batch.
func (o *explainOptions) askAgent(cmd *cobra.Command) error {
	c := dialAgent(o.agent)
	query := url.Values{"namespace": {o.namespace}}
	if o.connections != "" {
		return o.batchAgent(cmd, c, query)
	}
	query.Set("from", o.query.From)
	query.Set("to", o.query.To)
	query.Set("port", o.query.Port)
	query.Set("protocol", o.query.Protocol)
	query.Set("output", o.output)
	return pageFrom(cmd, c, "/v1/explain", query)
}

// pageFrom prints an agent's answer, with the note about it before.
func pageFrom(cmd *cobra.Command, c *agentClient, page string, query url.Values) error {
	var b bytes.Buffer
	header, err := c.page(cmd.Context(), http.MethodGet, page, query, nil, &b)
	if err != nil {
		return err
	}
	noteAgent(cmd.ErrOrStderr(), header)
	if left := header.Get(leftOutHeader); left != "" {
		fmt.Fprintln(cmd.ErrOrStderr(), left)
	}
	_, err = cmd.OutOrStdout().Write(b.Bytes())
	return unlessClosed(err)
}

func (o *explainOptions) batchAgent(cmd *cobra.Command, c *agentClient, query url.Values) error {
	in := cmd.InOrStdin()
	if o.connections != "-" {
		f, err := os.Open(o.connections)
		if err != nil {
			return fmt.Errorf("opening connections: %w", err)
		}
		defer f.Close()
		in = f
	}
	header, err := c.page(cmd.Context(), http.MethodPost, "/v1/explain", query, in, cmd.OutOrStdout())
	if err != nil {
		return unlessClosed(err)
	}
	noteAgent(cmd.ErrOrStderr(), header)
	return batchOutcome(strconv.Atoi(header.Get(badHeader)))
}

// batchOutcome gives the exit code of a batch.
func batchOutcome(bad int, err error) error {
	if err != nil {
		return unlessClosed(err)
	}
	if bad > 0 {
		return exitError{code: 2, err: fmt.Errorf("lines that can't be answered: %d, see the errors in the output", bad)}
	}
	return nil
}
