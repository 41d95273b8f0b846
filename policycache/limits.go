package policycache

import (
	"fmt"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// MaxPolicyParts is how many rules, CIDRs (exceptions included), selectors and ports,
// each, one policy may have. Whoever may write policies in a namespace could otherwise
// keep every node's agent, and so everybody's changes, waiting for the compile of one
// of his. It is more than people write, and takes a fraction of a second.
const MaxPolicyParts = 10_000

// maxNamedRules is how many ingress rules a policy may have if a named port is in
// one of them: pods that give the name different numbers get tables of their own.
const maxNamedRules = 1000

// checkSize gives an error for a policy that is too large to be compiled. It isolates
// all the same, and none of its rules allows anything.
func checkSize(spec *networkingv1.NetworkPolicySpec) error {
	var n struct {
		rules, blocks, selectors, ports int
		names                           bool
	}
	peers := func(all []networkingv1.NetworkPolicyPeer) {
		for i := range all {
			if b := all[i].IPBlock; b != nil {
				n.blocks += 1 + len(b.Except)
				continue
			}
			n.selectors++
			for _, s := range []int{expressions(all[i].PodSelector), expressions(all[i].NamespaceSelector)} {
				n.selectors += s
			}
		}
	}
	for i := range spec.Ingress {
		n.rules++
		n.ports += len(spec.Ingress[i].Ports)
		for _, p := range spec.Ingress[i].Ports {
			n.names = n.names || p.Port != nil && p.Port.Type == intstr.String
		}
		peers(spec.Ingress[i].From)
	}
	for i := range spec.Egress {
		n.rules++
		n.ports += len(spec.Egress[i].Ports)
		peers(spec.Egress[i].To)
	}
	if rules := len(spec.Ingress); n.names && rules > maxNamedRules {
		return fmt.Errorf("%d ingress rules, and a named port among them: at most %d are taken then, so the policy isolates and allows nothing; give the number, or make several policies of it", rules, maxNamedRules)
	}
	for _, part := range []struct {
		what  string
		count int
	}{{"rules", n.rules}, {"CIDRs", n.blocks}, {"selectors, their labels and values counted", n.selectors}, {"ports", n.ports}, {"labels and values of podSelector", expressions(&spec.PodSelector)}} {
		if part.count > MaxPolicyParts {
			return fmt.Errorf("%d %s: at most %d are taken, so the policy isolates and allows nothing; make several policies of it", part.count, part.what, MaxPolicyParts)
		}
	}
	return nil
}

// expressions counts what a selector asks for.
func expressions(s *metav1.LabelSelector) int {
	if s == nil {
		return 0
	}
	n := len(s.MatchLabels)
	for i := range s.MatchExpressions {
		n += 1 + len(s.MatchExpressions[i].Values)
	}
	return n
}
