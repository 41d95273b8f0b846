package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"sync"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"portcullis/policycache/kube"
)

// everywhere tells whether all nodes' agents are to be asked.
func (o *diffOptions) everywhere(f *pflag.FlagSet) (bool, error) {
	switch {
	case o.all && f.Changed("agent"):
		return false, errors.New("--all excludes --agent: it is one node's agent or all of them")
	case o.all && f.Changed("manifests"):
		return false, errors.New("--all excludes --manifests: the agents compare with their API server")
	case o.all:
		return true, nil
	}
	return !f.Changed("agent") && !f.Changed("manifests") && !dialAgent(o.agent).there() && o.hasCluster(), nil
}

// hasCluster tells whether an API server is named or can be found. Where none is, the
// missing socket is what there is to say.
func (o *diffOptions) hasCluster() bool {
	if o.cluster.kubeconfig != "" || o.cluster.context != "" {
		return true
	}
	_, err := o.cluster.connect()
	return err == nil
}

// differ is a node that can be asked what differs.
type differ interface {
	name() string
	// diff gives what diff prints there. An error of *kube.ExitError with code 1 says
	// that there are differences.
	diff(ctx context.Context, args []string) ([]byte, error)
}

func (p podSource) diff(ctx context.Context, args []string) ([]byte, error) {
	var out bytes.Buffer
	err := p.run(ctx, append([]string{"diff"}, args...), func(line []byte) error {
		out.Write(line)
		out.WriteByte('\n')
		return nil
	})
	return out.Bytes(), err
}

// askAll asks all agents and prints their answers in the order of the nodes.
func (o *diffOptions) askAll(ctx context.Context, out, errs io.Writer) error {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // client-go's words aren't the user's
	client, err := o.cluster.connect()
	if err != nil {
		return err
	}
	pods, err := agentPods(ctx, client, o.namespace)
	if err != nil {
		return err
	}
	var nodes []differ
	for _, p := range pods {
		nodes = append(nodes, p)
	}
	return o.report(ctx, nodes, out, errs)
}

// report prints what each node says: text after text, or one JSON array. The exit code
// is 2 if any gives no answer, 1 if any differs.
func (o *diffOptions) report(ctx context.Context, nodes []differ, out, errs io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout+o.settle)
	defer cancel()
	args := []string{"--settle", o.settle.String(), "-o", o.output}
	said, failed := make([][]byte, len(nodes)), make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() { said[i], failed[i] = n.diff(ctx, args) })
	}
	all.Wait()
	code := 0
	troubles := newTroubles(errs)
	answers := [][]byte{}
	for i, n := range nodes {
		var exit *kube.ExitError
		switch {
		case failed[i] == nil:
		case errors.As(failed[i], &exit) && exit.Code == 1:
			code = max(code, 1)
		default:
			code = 2
			troubles.tell(n.name(), failed[i])
			continue
		}
		answers = append(answers, said[i])
	}
	if err := o.print(out, answers); err != nil {
		return unlessClosed(err)
	}
	if code > 0 {
		return exitError{code: code}
	}
	return nil
}

func (o *diffOptions) print(out io.Writer, answers [][]byte) error {
	if o.output != "json" {
		_, err := out.Write(bytes.Join(answers, []byte("\n")))
		return err
	}
	list := make([]json.RawMessage, len(answers))
	for i, a := range answers {
		list[i] = a
	}
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(list)
}
