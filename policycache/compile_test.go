package policycache

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestSelectorsLongGoneAreForgotten: a policy that names other selectors with
// every change mustn't fill the memory of an agent that runs for months.
func TestSelectorsLongGoneAreForgotten(t *testing.T) {
	c := NewCompiler("", slog.New(slog.DiscardHandler))
	most := 0
	for change := range 300 {
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}}
		for i := range 20 {
			labels := map[string]string{"of": fmt.Sprintf("%d-%d", change, i)}
			np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{
				From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: labels}}},
			})
		}
		o := NewObjects()
		o.Policies["a/p"] = np
		c.Compile(o)
		most = max(most, len(c.podLabels.selectors.all))
	}
	if most < 20 || most > 100 {
		t.Errorf("6000 selectors came and went, and %d were remembered at once; want those of two policies", most)
	}
}

// TestNothingIsLeftBehind lets a cluster with many equal policies come and go:
// equal rules are kept once, and of what is gone nothing stays.
func TestNothingIsLeftBehind(t *testing.T) {
	c := NewCompiler("", slog.New(slog.DiscardHandler))
	o := NewObjects()
	for i := range 100 {
		ns := fmt.Sprint("ns-", i)
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "p"}}
		np.Spec.PolicyTypes = []networkingv1.PolicyType{"Ingress", "Egress"}
		peer := networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": "blue"}}}
		np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{peer}}}
		np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{peer}}}
		o.Policies[ns+"/p"] = np
		p := &Pod{Namespace: ns, Name: "pod", Labels: map[string]string{"app": "web"}, Node: "n",
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}, HostIPs: []netip.Addr{netip.AddrFrom4([4]byte{192, 168, 0, 1})}}
		o.Pods[p.Key()] = p
	}
	c.Compile(o)
	if len(c.rules) != 1 || len(c.podLabels.sets.ids) != 1 || len(c.tables) != 200 {
		t.Errorf("100 equal policies and pods: %d lists of rules, %d label sets, %d tables", len(c.rules), len(c.podLabels.sets.ids), len(c.tables))
	}
	c.Compile(NewObjects())
	left := []int{len(c.rules), len(c.tables), len(c.pods), len(c.namespaces), len(c.policies), len(c.nodeAddrs), len(c.claims.only)}
	for _, m := range []*matcher{c.podLabels, c.namespaceLabels} {
		left = append(left, len(m.sets.ids), len(m.selectors.ids), len(m.setsBy), len(m.selectorsBy))
	}
	if slices.Max(left) != 0 {
		t.Errorf("of a cluster that is gone there is left: %v", left)
	}
}
