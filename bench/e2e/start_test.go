package e2e

import (
	"strings"
	"testing"

	"portcullis/bench/lab"
)

// TestSecondAgent starts agents where one runs already, each with other flags: each
// takes over from the one before it.
func TestSecondAgent(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "second", lab.Routed)
	w.start()
	for _, args := range [][]string{{}, {"--fail-open"}, {"--queue-base=500"}, {"--iptables-backend=legacy"},
		{"--queues=2", "--iptables-backend=nft"}, {"--queues=3", "--mark-bits=0x30000000"}} {
		w.succeed(args...)
		w.expect(gateJudged)
	}
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
