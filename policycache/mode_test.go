package policycache

import (
	"log/slog"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/verdict"
)

// TestMode changes modes while the state goes on: the verdict follows at once,
// cached or not, and the most specific word counts.
func TestMode(t *testing.T) {
	ip, from := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("192.0.2.1")
	for _, fallback := range []verdict.Mode{verdict.ModeDefault, verdict.ModeAuditOnly} {
		c := NewCompiler("n1", slog.New(slog.DiscardHandler))
		c.SetMode(fallback)
		pod := &Pod{Namespace: "a", Name: "db", Node: "n1", IPs: []netip.Addr{ip}}
		deny := &networkingv1.NetworkPolicy{}
		deny.Namespace, deny.Name = "a", "deny"
		deny.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
		engine := verdict.NewEngine()
		worker := engine.NewWorker(8)
		var changes uint64
		for _, step := range []struct {
			node, namespace string
			want            verdict.Verdict // 0 for what the fallback says
			problems        int
		}{
			{"", "", 0, 0}, {"audit-only", "", verdict.WouldDeny, 0}, {"audit-only", "enforce", verdict.Deny, 0},
			{"enforce", "enforce", verdict.Deny, 0}, {"enforce", "audit-only", verdict.WouldDeny, 0}, {"enforce", "", verdict.Deny, 0},
			{"of", "", 0, 1}, {"of", "on", 0, 2}, {"", "on", 0, 1}, {"", "audit-only", verdict.WouldDeny, 0}, {"-", "", 0, 0}, {"-", "audit-only", verdict.WouldDeny, 0},
		} {
			o := NewObjects()
			o.Pods["a/db"], o.Policies["a/deny"] = pod, deny
			o.Namespaces["a"] = &Namespace{Name: "a", Mode: step.namespace}
			if step.node != "-" { // else the node isn't known
				o.Nodes["n1"] = &Node{Name: "n1", Mode: step.node}
			}
			s := c.Compile(o)
			engine.Swap(s)
			want := step.want
			if want == verdict.Deny && step.namespace != "enforce" && step.node != "enforce" && fallback == verdict.ModeAuditOnly {
				want = verdict.WouldDeny
			}
			f := verdict.Flow{Src: from, Dst: ip, Proto: verdict.TCP, DstPort: 80}
			d := *worker.Decide(&f)
			if d.Verdict != want || !worker.Decide(&f).Cached {
				t.Errorf("%q: node %q, namespace %q: %v, want %v", fallback, step.node, step.namespace, d.Verdict, want)
			}
			if s.Endpoint(ip).Meaning == changes && !d.Cached {
				t.Errorf("%+v: the verdict was forgotten for nothing", step)
			}
			changes = s.Endpoint(ip).Meaning
			if p := c.Problems(); len(p) != step.problems {
				t.Errorf("%+v: problems %v", step, p)
			}
		}
	}
}
