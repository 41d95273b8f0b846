package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"portcullis/policycache"
)

// TestStateNamesWhatChanges lets pods come, change and go, and holds each taken
// state against a copy made the slow way: all that differs from the one before
// is named, and states taken earlier stay as they were.
func TestStateNamesWhatChanges(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	s, want := newState(), map[string]*policycache.Pod{}
	var before, beforeWant map[string]*policycache.Pod
	for step := range 500 {
		for range r.IntN(4) {
			o, err := transform(pod("shop", fmt.Sprint("p", r.IntN(30)), fmt.Sprint("10.0.0.", 1+r.IntN(3)), nil))
			if err != nil {
				t.Fatal(err)
			}
			kept := o.(*slim)
			if r.IntN(3) == 0 {
				s.remove(pods, kept.key())
				delete(want, kept.key())
			} else if s.set(kept) {
				want[kept.key()] = kept.value.(*policycache.Pod)
			}
		}
		o := s.take()
		if !maps.Equal(o.Pods, want) || !maps.Equal(before, beforeWant) {
			t.Fatalf("step %d: the pods taken, or those taken before, are wrong", step)
		}
		if (o.Changed == nil) != (step == 0) {
			t.Fatalf("step %d: changes %v", step, o.Changed)
		}
		for key := range want {
			if o.Changed != nil && before[key] != want[key] && !slices.Contains(o.Changed.Pods, key) {
				t.Fatalf("step %d: the change of %s isn't named", step, key)
			}
		}
		for key := range before {
			if want[key] == nil && !slices.Contains(o.Changed.Pods, key) {
				t.Fatalf("step %d: the end of %s isn't named", step, key)
			}
		}
		before, beforeWant = o.Pods, maps.Clone(want)
	}
}
