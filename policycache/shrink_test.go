package policycache_test

import (
	"iter"
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/policycache"
	"portcullis/verdict"
)

// report fails the test with the smallest cluster that a few deletions leave.
// A disagreement that a fresh engine doesn't show needs the seed's history.
func report(t *testing.T, seed string, o *policycache.Objects, bad *disagreement) {
	t.Helper()
	flows := []verdict.Flow{bad.flow}
	fails := func(o *policycache.Objects) bool { return newRig(bad.node).check(newDice(1), o, flows) != nil }
	if !fails(o) {
		t.Fatalf("%s: only after what came before (stale?): %v\n%s", seed, bad, dump(o))
	}
	o = shrink(o, fails)
	t.Fatalf("%s: %v\n%s", seed, newRig(bad.node).check(newDice(1), o, flows), dump(o))
}

// shrink drops objects, rules, peers and ports for as long as it still fails
// and has tries left.
func shrink(o *policycache.Objects, fails func(*policycache.Objects) bool) *policycache.Objects {
	tries := 2000
	for again := true; again; {
		again = false
		for smaller := range smallerThan(o) {
			if tries--; tries < 0 {
				return o
			}
			if fails(smaller) {
				o, again = smaller, true
				break
			}
		}
	}
	return o
}

// smallerThan yields every state that has one object, or some rules of a
// policy, or one peer or port of a rule less, the biggest cuts first.
func smallerThan(o *policycache.Objects) iter.Seq[*policycache.Objects] {
	return func(yield func(*policycache.Objects) bool) {
		for k := range o.Policies {
			c := clone(o, false)
			delete(c.Policies, k)
			if !yield(c) {
				return
			}
		}
		for k := range o.Pods {
			c := clone(o, false)
			delete(c.Pods, k)
			if !yield(c) {
				return
			}
		}
		for k := range o.Namespaces {
			c := clone(o, false)
			delete(c.Namespaces, k)
			if !yield(c) {
				return
			}
		}
		for k := range o.Nodes {
			c := clone(o, false)
			delete(c.Nodes, k)
			if !yield(c) {
				return
			}
		}
		for k, p := range o.Policies {
			for q := range smallerPolicies(p) {
				c := clone(o, false)
				c.Policies[k] = q
				if !yield(c) {
					return
				}
			}
		}
	}
}

// smallerPolicies yields a policy without some of its rules, peers and ports.
func smallerPolicies(p *networkingv1.NetworkPolicy) iter.Seq[*networkingv1.NetworkPolicy] {
	return func(yield func(*networkingv1.NetworkPolicy) bool) {
		cut := func(at func(*networkingv1.NetworkPolicy) cutter) bool {
			n := at(p).len
			for size := n; size > 0; size /= 2 {
				for from := 0; from+size <= n; from += size {
					q := p.DeepCopy()
					at(q).cut(from, from+size)
					if !yield(q) {
						return false
					}
				}
			}
			return true
		}
		if !cut(func(p *networkingv1.NetworkPolicy) cutter { return cutterOf(&p.Spec.Ingress) }) ||
			!cut(func(p *networkingv1.NetworkPolicy) cutter { return cutterOf(&p.Spec.Egress) }) {
			return
		}
		for i := range p.Spec.Ingress {
			if !cut(func(p *networkingv1.NetworkPolicy) cutter { return cutterOf(&p.Spec.Ingress[i].From) }) ||
				!cut(func(p *networkingv1.NetworkPolicy) cutter { return cutterOf(&p.Spec.Ingress[i].Ports) }) {
				return
			}
		}
		for i := range p.Spec.Egress {
			if !cut(func(p *networkingv1.NetworkPolicy) cutter { return cutterOf(&p.Spec.Egress[i].To) }) ||
				!cut(func(p *networkingv1.NetworkPolicy) cutter { return cutterOf(&p.Spec.Egress[i].Ports) }) {
				return
			}
		}
	}
}

// cutter is a list of any type out of which a stretch can be cut.
type cutter struct {
	len int
	cut func(from, to int)
}

func cutterOf[T any](list *[]T) cutter {
	return cutter{len(*list), func(from, to int) { *list = slices.Delete(*list, from, to) }}
}

func dump(o any) string {
	text, err := yaml.Marshal(o)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
