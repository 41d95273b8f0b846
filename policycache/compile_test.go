package policycache

import (
	"fmt"
	"log/slog"
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
