package bench

import (
	"testing"

	"portcullis/policycache"
	"portcullis/verdict"
)

// TestChangesBuildOnlyWhatTheyConcern counts what the compiler builds for one
// change, and holds that the tables of all other pods are the ones of before.
func TestChangesBuildOnlyWhatTheyConcern(t *testing.T) {
	most := map[string]policycache.Work{
		"pod-labels":             {Endpoints: 1, Tables: 2},
		"pod-goes-and-comes":     {Endpoints: 1, Tables: 2},
		"policy":                 {Endpoints: 10, Tables: 20, Policies: 1},
		"policy-of-1000-pods":    {Endpoints: 1_010, Tables: 100, Policies: 1},
		"namespace-of-1000-pods": {Endpoints: 1_010},
		"node":                   {},
	}
	town := newTown("", 3_000, 3_000)
	for _, c := range changes {
		most, ok := most[c.name]
		if !ok {
			t.Fatalf("nothing is known about %s", c.name)
		}
		before := tablesOf(town)
		c.change(town)
		work := town.compiler.Work()
		if work.Endpoints > most.Endpoints || work.Tables > most.Tables || work.Policies > most.Policies {
			t.Errorf("%s built %+v, want at most %+v", c.name, work, most)
		}
		if work.Endpoints == 0 && most.Endpoints > 0 {
			t.Errorf("%s built nothing", c.name)
		}
		others := 0
		for i, tables := range tablesOf(town) {
			if tables != before[i] {
				others++
			}
		}
		if others > most.Endpoints {
			t.Errorf("%s gave %d pods other tables, want at most %d", c.name, others, most.Endpoints)
		}
	}
}

// TestPoliciesConcernOnlyTheNodesPods: an agent builds nothing for the pods of other
// nodes when a policy that selects them changes, which has no say in their decisions
// there; when their namespace's labels change, it does.
func TestPoliciesConcernOnlyTheNodesPods(t *testing.T) {
	town := newTown("node-0", 3_000, 3_000)
	for _, c := range changes {
		c.change(town)
		got := town.compiler.Work().Endpoints
		switch {
		case c.name == "policy-of-1000-pods" && (got == 0 || got > 20):
			t.Errorf("%s built %d endpoints, want about ten", c.name, got)
		case c.name == "namespace-of-1000-pods" && got < 1_000:
			t.Errorf("%s built %d endpoints, want all of the namespace", c.name, got)
		}
	}
}

// tablesOf lists the tables of all pods.
func tablesOf(t *town) (tables [][2]*verdict.Table) {
	t.Changed = &policycache.Changed{}
	s := t.compiler.Compile(t.Objects)
	for i := range 3_000 {
		e := s.Endpoint(PodIPv4(i))
		tables = append(tables, [2]*verdict.Table{e.Ingress, e.Egress})
	}
	return tables
}
