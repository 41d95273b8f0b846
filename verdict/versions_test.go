package verdict

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
)

// TestVersionsAgainstMaps lets policies' versions come, change and go over many
// snapshots, and compares each, and an older one, with plain maps.
func TestVersionsAgainstMaps(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	want := map[string]string{}
	s := NewSnapshot(Input{Generation: 1}, nil)
	old, oldWant := s, maps.Clone(want)
	for step := range uint64(2000) {
		changed := map[string]string{}
		for range r.IntN(4) {
			policy := fmt.Sprint("a/p", r.IntN(600))
			changed[policy] = []string{"", fmt.Sprint(step)}[r.IntN(2)]
			if want[policy] = changed[policy]; want[policy] == "" {
				delete(want, policy)
			}
		}
		s = s.Next(Change{Generation: step + 2, Versions: changed})
		if step%100 == 0 {
			compareVersions(t, s, want)
			compareVersions(t, old, oldWant)
			old, oldWant = s, maps.Clone(want)
			if len(s.versions.recent) > recentVersions {
				t.Fatalf("%d versions beside the others", len(s.versions.recent))
			}
		}
	}
	whole := map[string]string{"a/p1": "x", "b/q": "y"}
	compareVersions(t, NewSnapshot(Input{Generation: 3000, Versions: whole}, s), whole)
}

func compareVersions(t *testing.T, s *Snapshot, want map[string]string) {
	t.Helper()
	for i := range 600 {
		policy := fmt.Sprint("a/p", i)
		if got := s.PolicyVersion(policy); got != want[policy] {
			t.Fatalf("generation %d: %s is of version %q, want %q", s.Generation(), policy, got, want[policy])
		}
	}
	if got := s.versions.together(); !maps.Equal(got, want) {
		t.Fatalf("generation %d: %d versions, want %d", s.Generation(), len(got), len(want))
	}
}
