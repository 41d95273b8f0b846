package policycache

import (
	"log/slog"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/verdict"
)

// TestWhatIsForTheLogRecompilesNothing changes what only the decision log looks
// at: it reaches the snapshot, and tables and cached verdicts stay.
func TestWhatIsForTheLogRecompilesNothing(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	c := NewCompiler("n1", slog.New(slog.DiscardHandler))
	compile := func(audit, version, workload string) *verdict.Snapshot {
		o := NewObjects()
		o.Namespaces["a"] = NamespaceFrom(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "a", Annotations: map[string]string{AuditAnnotation: audit}}})
		o.Pods["a/db"] = &Pod{Namespace: "a", Name: "db", Node: "n1", IPs: []netip.Addr{ip}, Workload: workload, Labels: map[string]string{"app": "db"}}
		o.Policies["a/deny"] = &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "deny", ResourceVersion: version}}
		return c.Compile(o)
	}
	first := compile("", "", "")
	was := first.Endpoint(ip)
	if was.Audit != verdict.AuditDefault || first.PolicyVersion("a/deny") != "" || was.Labels["app"] != "db" {
		t.Errorf("before: %+v", was)
	}
	second := compile("denied", "42", "Deployment/db")
	is := second.Endpoint(ip)
	if is.Audit != verdict.AuditDenied || is.Workload != "Deployment/db" || second.PolicyVersion("a/deny") != "42" {
		t.Errorf("after: %+v, version %q", is, second.PolicyVersion("a/deny"))
	}
	if is.Ingress != was.Ingress || is.Ingress == nil || is.Meaning != was.Meaning {
		t.Error("a table was compiled anew, or cached verdicts were given up")
	}
	compile("everything", "42", "")
	if p := c.Problems(); len(p) != 1 || p[0].Object != "namespace a" {
		t.Errorf("a wrong annotation: %v", p)
	}
}

// TestWorkload names what controls a pod, and nothing that could be wrong.
func TestWorkload(t *testing.T) {
	for _, c := range []struct {
		kind, owner, hash string
		controls          bool
		want              string
	}{
		{"ReplicaSet", "web-7d9c7b8f", "7d9c7b8f", true, "Deployment/web"},
		{"ReplicaSet", "web-7d9c7b8f", "", true, "ReplicaSet/web-7d9c7b8f"},
		{"ReplicaSet", "web-7d9c7b8f", "abc", true, "ReplicaSet/web-7d9c7b8f"},
		{"StatefulSet", "db-7d9c7b8f", "7d9c7b8f", true, "StatefulSet/db-7d9c7b8f"},
		{"Job", "backup-1", "", true, "Job/backup-1"},
		{"ReplicaSet", "web-7d9c7b8f", "7d9c7b8f", false, ""},
	} {
		p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{"pod-template-hash": c.hash},
			OwnerReferences: []metav1.OwnerReference{{Kind: c.kind, Name: c.owner, Controller: &c.controls}}}}
		if got := PodFrom(&p).Workload; got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
	if got := PodFrom(&corev1.Pod{}).Workload; got != "" {
		t.Errorf("a pod of nobody: %q", got)
	}
}
