package policycache_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"portcullis/policycache"
)

// TestChangedAddressesAreEnough holds the promise on which open connections are
// judged anew: a flow that the oracle judges otherwise after a change, in verdict
// or in why, has an end among the addresses that the snapshot says have changed.
// It also holds that a change is told apart from none: most flows whose ends are
// both unchanged exist, or the first half would say nothing.
func TestChangedAddressesAreEnough(t *testing.T) {
	const shards = 4
	for shard := range uint64(shards) {
		t.Run(fmt.Sprint(shard), func(t *testing.T) {
			t.Parallel()
			differ, spared := 0, 0
			for seed := *seedFlag + shard; seed < *seedFlag+*clustersFlag/4; seed += shards {
				d := newDice(seed + 1_000_000)
				o := d.town(8)
				node := pick(d, "", "n1", "n2")
				c := policycache.NewCompiler(node, quiet)
				c.Compile(o)
				for range 5 {
					next := d.mutate(o)
					s := c.Compile(next)
					for _, f := range append(d.flows(o, 12), d.flows(next, 12)...) {
						touched := slices.ContainsFunc([]netip.Addr{f.Src, f.Dst}, func(a netip.Addr) bool { return slices.Contains(s.Changed(), a) })
						before, after := oracle(o, node, f), oracle(next, node, f)
						switch {
						case before != after && !touched:
							t.Fatalf("-seed %d: flow %+v, node %q: was %s, is %s, and neither end is among %v", seed, f, node, before, after, s.Changed())
						case before.Verdict != after.Verdict:
							differ++
						case !touched:
							spared++
						}
					}
					o = next
				}
			}
			if differ < 20 || spared < 1000 {
				t.Errorf("%d flows changed their verdict, %d had nothing to do with a change: too few to mean anything", differ, spared)
			}
		})
	}
}

// TestChangedAddressesAreFew: a change names those whom it concerns and no others.
func TestChangedAddressesAreFew(t *testing.T) {
	d := newDice(5)
	o := d.town(30)
	c := policycache.NewCompiler("", quiet)
	first := c.Compile(o)
	if n := len(first.Changed()); n < 20 {
		t.Errorf("the first state changes %d addresses", n)
	}
	if s := c.Compile(clone(o, true)); len(s.Changed()) != 0 {
		t.Errorf("the same state again changes %v", s.Changed())
	}
	next := clone(o, false)
	pod := *next.Pods["a/pod1"]
	pod.Labels = map[string]string{"never": "seen"}
	next.Pods["a/pod1"] = &pod
	s := c.Compile(next)
	for _, a := range s.Changed() {
		if !slices.Contains(pod.IPs, a) {
			t.Errorf("%s has changed, and a/pod1 has %v", a, pod.IPs)
		}
	}
	owns := slices.ContainsFunc(pod.IPs, func(a netip.Addr) bool { e := s.Endpoint(a); return e != nil && e.Key() == "a/pod1" })
	if owns && len(s.Changed()) == 0 {
		t.Error("a pod's labels changed, and no address did")
	}
}
