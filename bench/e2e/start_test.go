package e2e

import (
	"strings"
	"testing"
	"time"

	"portcullis/bench/lab"
)

// TestSecondAgent starts agents where one runs already, wrongly set up in every
// way: one line says why they can't, and the first goes on undisturbed.
func TestSecondAgent(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "second", lab.Routed)
	w.start()
	for _, args := range [][]string{{"--node", lab.NodeName}, {"--node", "node-7"}, {"--node", lab.NodeName, "--fail-open"},
		{"--node", "node-7", "--queue-base=500"}, {"--node", lab.NodeName, "--queue-base=500", "--iptables-backend=legacy"}} {
		second := w.start2nd(args...)
		if !strings.Contains(second, "queue") || strings.Contains(second, "goroutine ") {
			t.Errorf("%v: the second agent doesn't say what is wrong: %s", args, second)
		}
		w.expect(gateJudged)
	}
}

// start2nd runs another agent that must end by itself with an error, and gives
// what it wrote.
func (w *world) start2nd(args ...string) string {
	w.Helper()
	argv := append([]string{binary, "agent", "--manifests", w.dir, "--http", "127.0.0.1:9354", "--socket", ""}, args...)
	p, err := w.lab.Run(w.Context(), lab.Node, argv...)
	w.must(err)
	select {
	case <-p.Done():
	case <-time.After(patient):
		w.Fatalf("%v goes on: %s", args, p.Output())
	}
	if err := p.Wait(patient); err == nil {
		w.Errorf("%v ends as if all were well", args)
	}
	return p.Output()
}

// TestStartingErrors starts agents that can't work: the last line says why,
// and nothing is left in the kernel.
func TestStartingErrors(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "errors", lab.Routed)
	w.must(w.lab.Manifests(w.dir))
	good := []string{binary, "agent", "--manifests", w.dir, "--node", lab.NodeName, "--socket", ""}
	for _, c := range []struct {
		argv []string
		want string
	}{
		{append([]string{"/usr/bin/env", "PATH=/nowhere"}, good...), "iptables"},
		{append([]string{"setpriv", "--bounding-set", "-net_admin"}, good...), "CAP_NET_ADMIN"},
		{append(good, "--manifests", "/no/such/directory"), "/no/such/directory"},
		{append(good, "--mark-bits", "0x7"), "--mark-bits"},
		{append(good, "--queues", "0"), "--queues"},
		{append(good, "--iptables-backend", "pf"), "pf"},
		{append(good, "--http", "nonsense"), "--http"},
		{append(good, "--decision-log", "/no/such/directory/log"), "--decision-log"},
		{[]string{binary, "agent", "--manifests", w.dir, "--node="}, "--node"},
		{[]string{binary, "agent", "--node", "x"}, "--manifests"},
	} {
		out, err := w.lab.Command(t.Context(), lab.Node, c.argv...)
		if err == nil {
			t.Errorf("%v: no error", c.argv)
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		last := lines[len(lines)-1]
		if !strings.HasPrefix(last, "portcullis: ") || !strings.Contains(last, c.want) || strings.Contains(out, "goroutine ") {
			t.Errorf("%v: want a line about %s, got: %s", c.argv, c.want, out)
		}
	}
	if ours := w.rules(); len(ours) != 0 {
		t.Errorf("left in iptables: %q", ours)
	}
	w.expect(gateOpen)
}

// TestBrokenFileAtStart starts on a file of which there is no last good state:
// nobody knows what it would isolate, so the agent isn't ready until it is
// mended.
func TestBrokenFileAtStart(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "broken", lab.Routed)
	w.apply("broken.yaml", policy("b/free", `{podSelector: {}, ingres: []}`))
	w.launch()
	w.until("readyz names the file", func() error {
		text, err := w.get("/readyz")
		if err == nil || !strings.Contains(text, "broken.yaml") {
			return errNotYet
		}
		return nil
	})
	w.settle(gateJudged) // the other files are in force
	w.apply("broken.yaml", policy("b/free", `{podSelector: {}, ingress: []}`))
	w.until("the agent is ready", func() error {
		_, err := w.get("/readyz")
		return err
	})
	w.settle("deny tcp a/web b/free:80")
}
