package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"portcullis/bench/lab"
)

// countedCommands gives a directory with scripts in place of the iptables commands,
// which run these and note it, a line each, in a file.
func countedCommands(t *testing.T) (dir, record string) {
	t.Helper()
	dir = t.TempDir()
	record = filepath.Join(dir, "record")
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, of := range []string{"", "-save", "-restore"} {
			for _, backend := range []string{"", "-nft", "-legacy"} {
				command := name + backend + of
				path, err := exec.LookPath(command)
				if err != nil {
					t.Fatal(err)
				}
				// The plain command goes by the name that it is called by.
				script := fmt.Sprintf("#!/bin/sh\necho %s \"$@\" >> %s\nexec %s \"$@\"\n", command, record, path)
				if err := os.WriteFile(filepath.Join(dir, command), []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return dir, record
}

var (
	commandsTotal = regexp.MustCompile(`(?m)^portcullis_iptables_commands_total (\S+)$`)
	generationNow = regexp.MustCompile(`(?m)^portcullis_snapshot_generation (\S+)$`)
)

// TestChurnRunsNoIptables: hundreds of changes of pods and policies run no iptables
// command. Somebody else's change of the rules has the agent read them, and mend them
// where they are its own.
func TestChurnRunsNoIptables(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "churn")
	for i := range 3 {
		w.pod(lab.Routed, fmt.Sprintf("a/pod-%d", i), 11+i, "app=web")
	}
	dir, record := countedCommands(t)
	w.must(w.lab.Manifests(w.dir))
	p, err := w.lab.Run(context.Background(), lab.Node, "env", "PATH="+dir+":"+os.Getenv("PATH"), binary, "agent",
		"--manifests", w.dir, "--node", lab.NodeName, "--http", httpAddr, "--iptables-backend", "nft", "-v")
	w.must(err)
	w.agent = p
	w.until("the agent is ready", func() error { _, err := w.get("/readyz"); return err })
	counts := func() string {
		b, err := os.ReadFile(record)
		w.must(err)
		text, err := w.get("/metrics")
		w.must(err)
		metric := commandsTotal.FindStringSubmatch(text)
		if metric == nil {
			t.Fatalf("no count of iptables commands in\n%s", text)
		}
		if lines := strings.Count(string(b), "\n"); fmt.Sprint(lines) != metric[1] {
			t.Errorf("the agent has counted %s commands, and %d were run:\n%s", metric[1], lines, b)
		}
		return metric[1]
	}
	atRest := func() string {
		last := counts()
		w.until("the agent has looked at its rules", func() error {
			before := last
			time.Sleep(restFor)
			if last = counts(); last != before {
				return errNotYet
			}
			return nil
		})
		return last
	}
	generation := func() (n int) {
		text, err := w.get("/metrics")
		w.must(err)
		_, err = fmt.Sscan(generationNow.FindStringSubmatch(text)[1], &n)
		w.must(err)
		return n
	}
	before, compiled := atRest(), generation()
	for i := range churns {
		w.apply("pods.yaml", fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {namespace: a, name: come-%d, labels: {app: web}}\n"+
			"spec: {nodeName: %s}\nstatus: {podIP: 10.9.0.%d}\n", i, lab.NodeName, 1+i%250))
		if i%2 == 0 {
			w.apply("policy.yaml", policy("a/churn", `{podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}`))
		} else {
			w.remove("policy.yaml")
		}
		time.Sleep(churnEvery)
	}
	w.apply("policy.yaml", policy("a/last", denyIngress))
	w.settle("deny tcp a/pod-0 a/pod-1:80")
	if set := w.command("ipset", "list", "portcullis-4"); !strings.Contains(set, fmt.Sprintf("10.9.0.%d", 1+(churns-1)%250)) {
		t.Errorf("the set doesn't hold the pod that came last:\n%s", set)
	}
	if n := generation() - compiled; n < churns/2 {
		t.Errorf("only %d states were compiled for %d changes", n, 2*churns)
	}
	if after := atRest(); after != before {
		b, _ := os.ReadFile(record)
		t.Errorf("%s commands had been run before the churn, %s after it:\n%s", before, after, b)
	}
	w.command("iptables-nft", "-t", "mangle", "-F", "FORWARD")
	w.settle("deny tcp a/pod-0 a/pod-1:80\ndeny tcp a/pod-2 a/pod-1:80")
	if after := atRest(); after == before {
		t.Errorf("still %s commands after a repair: nothing counts", after)
	}
}

const (
	churns     = 200
	churnEvery = 25 * time.Millisecond   // so that the agent takes in nearly all, one by one
	restFor    = 2500 * time.Millisecond // longer than from one look at the kernel to the next
)
