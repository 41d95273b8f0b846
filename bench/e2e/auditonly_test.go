package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/bench/lab"
)

// mode puts the annotation on a namespace, or on the node as the lab's manifest
// has it; "" takes it off.
func (w *world) mode(namespace, mode string) {
	w.Helper()
	if namespace != "" {
		w.apply("zz-"+namespace+".yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+namespace+", annotations: {portcullis.dev/mode: \""+mode+"\"}}\n")
		return
	}
	b, err := os.ReadFile(filepath.Join(w.dir, "lab-nodes.yaml"))
	w.must(err)
	node := strings.Replace(string(b), "metadata:\n", "metadata:\n  annotations: {portcullis.dev/mode: \""+mode+"\"}\n", 1)
	w.apply("zz-node.yaml", node)
}

// inForce waits until a change has been compiled.
func (w *world) inForce(change func()) {
	w.Helper()
	before := w.metric("portcullis_snapshot_generation")
	change()
	w.until("the change is in force", func() error {
		if w.metric("portcullis_snapshot_generation") == before {
			return errNotYet
		}
		return nil
	})
}

// auditOnlyPasses is gateJudged with all denials left out.
var auditOnlyPasses = strings.ReplaceAll(gateJudged, "deny ", "allow")

// TestAuditOnly switches modes while the agent runs: everything passes and is
// logged as would-deny, or denied at once, verdicts in the cache included.
func TestAuditOnly(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "auditonly", lab.Routed)
	w.start("--queues", "1", "--audit-only")
	w.expect(auditOnlyPasses)
	for _, d := range w.logged(8, func(d line) bool { return d.Verdict == "would-deny" }) {
		if d.Reason != "no-rule" || d.Count != 1 || d.Egress.Verdict == "deny" || d.Ingress.Verdict == "deny" {
			t.Errorf("%+v", d)
		}
	}
	if n := w.metric("portcullis_audit_only_pods"); n != 1 {
		t.Errorf("%v pods are in audit-only mode", n)
	}
	if text, _ := w.get("/readyz?verbose"); !strings.Contains(text, "1 of 1 isolated pods here are in audit-only mode") {
		t.Errorf("/readyz?verbose says\n%s", text)
	}
	// A namespace goes before the agent's flag, and so does the node; and back.
	w.inForce(func() { w.mode("a", "enforce") })
	w.expect(gateJudged)
	w.inForce(func() { w.mode("a", "") })
	w.expect(auditOnlyPasses)
	w.inForce(func() { w.mode("", "enforce") })
	w.expect(gateJudged)
	w.inForce(func() { w.mode("a", "audit-only") })
	w.expect(auditOnlyPasses)
	text, _ := w.get("/metrics")
	if !strings.Contains(text, `portcullis_directions_total{direction="ingress",reason="no-rule",verdict="would-deny"}`) ||
		!strings.Contains(text, `portcullis_decisions_total{reason="no-rule",verdict="would-deny"}`) {
		t.Error("no metric of would-deny")
	}
	if out, _, code := w.asked("explain", "--manifests", w.dir, "--from", "b/free", "--to", "a/db", "--port", "80"); code != 0 ||
		!strings.Contains(out, "WOULD-DENY  tcp b/free") || !strings.Contains(out, "but it is in audit-only mode") {
		t.Errorf("explain (%d): %s", code, out)
	}
}

// TestAuditOnlyBesideEnforcing has a connection between a namespace in audit-only
// mode and one that enforces, both of which deny it: the latter's denial counts.
func TestAuditOnlyBesideEnforcing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "beside")
	w.pod(lab.Routed, "a/x", 11, "")
	w.pod(lab.Routed, "b/y", 12, "")
	w.apply("a.yaml", policy("a/closed", `{podSelector: {}, policyTypes: [Ingress, Egress]}`))
	w.mode("a", "audit-only")
	w.start()
	w.expect("allow tcp a/x b/y:80\nallow tcp b/y a/x:80")
	w.inForce(func() { w.apply("b.yaml", policy("b/closed", `{podSelector: {}, policyTypes: [Ingress, Egress]}`)) })
	w.expect("deny tcp4 a/x b/y:80\ndeny tcp4 b/y a/x:80")
	w.until("both denials are logged", func() error {
		seen := map[string]bool{}
		for _, d := range w.decisions() {
			if d.Verdict == "deny" {
				seen[fmt.Sprint(d.Src.Pod, " ", d.Egress.Verdict, " ", d.Ingress.Verdict)] = true
			}
		}
		if fmt.Sprint(seen) != "map[x would-deny deny:true y deny would-deny:true]" {
			return fmt.Errorf("%v", seen)
		}
		return nil
	})
}
