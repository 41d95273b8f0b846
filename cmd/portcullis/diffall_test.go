package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"portcullis/policycache/kube"
)

// saysDiff is a node that says what it is given.
type saysDiff struct {
	node, text string
	err        error
	asked      *string
}

func (s saysDiff) name() string { return "node " + s.node }

func (s saysDiff) diff(_ context.Context, args []string) ([]byte, error) {
	if s.asked != nil {
		*s.asked = strings.Join(args, " ")
	}
	return []byte(s.text), s.err
}

// Without a socket a cluster that is named is asked, and says itself what is wrong with
// its name; where none is named or found, the socket is what is missing.
func TestWhomDiffAsks(t *testing.T) {
	t.Setenv("KUBECONFIG", "/no/such/file")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, row := range []struct {
		args string
		want bool
		err  string
	}{
		{"", false, ""},
		{"--all", true, ""},
		{"--kubeconfig /no/such/file", true, ""},
		{"--context nowhere", true, ""},
		{"--manifests x", false, ""},
		{"--agent x --kubeconfig y", false, ""},
		{"--all --agent x", false, "--all excludes --agent"},
		{"--all --manifests x", false, "--all excludes --manifests"},
	} {
		var o diffOptions
		f := pflag.NewFlagSet("diff", pflag.ContinueOnError)
		o.register(f)
		o.agent = filepath.Join(t.TempDir(), "none.sock") // whatever this machine has
		if err := f.Parse(strings.Fields(row.args)); err != nil {
			t.Fatal(err)
		}
		got, err := o.everywhere(f)
		if got != row.want || (err == nil) != (row.err == "") || err != nil && !strings.Contains(err.Error(), row.err) {
			t.Errorf("diff %s: %v, %v", row.args, got, err)
		}
	}
	o := diffOptions{cluster: clusterFlags{kubeconfig: "/no/such/file"}}
	if err := o.askAll(t.Context(), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "/no/such/file") {
		t.Errorf("the file isn't named: %v", err)
	}
}

// All nodes' answers are printed in order; who differs and who is silent decide the exit
// code, and the silent are named.
func TestDiffOfAllNodes(t *testing.T) {
	asked := ""
	same := saysDiff{node: "n1", text: "node n1\nno difference\n", asked: &asked}
	differs := saysDiff{node: "n2", text: "node n2\n1 difference\n", err: &kube.ExitError{Code: 1}}
	away := saysDiff{node: "n3", err: errors.New("it is\naway")}
	unable := saysDiff{node: "n4", text: "half", err: &kube.ExitError{Code: 2}}
	for _, row := range []struct {
		nodes     []differ
		out, errs string
		code      int
	}{
		{[]differ{same}, "node n1\nno difference\n", "", 0},
		{[]differ{same, differs}, "node n1\nno difference\n\nnode n2\n1 difference\n", "", 1},
		{[]differ{away, differs, same}, "node n2\n1 difference\n\nnode n1\nno difference\n", "node n3: it is; away\n", 2},
		{[]differ{unable}, "", "node n4:  ended with exit code 2\n", 2},
	} {
		var out, errs bytes.Buffer
		o := diffOptions{settle: time.Second, output: "text"}
		err := o.report(t.Context(), row.nodes, &out, &errs)
		var exit exitError
		errors.As(err, &exit)
		if exit.code != row.code || out.String() != row.out || errs.String() != row.errs {
			t.Errorf("%d, %q, %q; want %+v", exit.code, out.String(), errs.String(), row)
		}
	}
	if asked != "--settle 1s -o text" {
		t.Errorf("asked with %s", asked)
	}
	same.text, differs.text = `{"node": "n1"}`, `{"node": "n2"}`
	var out bytes.Buffer
	o := diffOptions{output: "json"}
	_ = o.report(t.Context(), []differ{same, differs}, &out, &bytes.Buffer{}) // that it differs
	var list []struct{ Node string }
	if err := json.Unmarshal(out.Bytes(), &list); err != nil || len(list) != 2 || list[1].Node != "n2" {
		t.Errorf("%s, %v", out.String(), err)
	}
}
