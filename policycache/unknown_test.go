package policycache_test

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"portcullis/policycache"
	"portcullis/verdict"
)

// TestPodRangesOfTheNode: where an agent looks out for unknown pods.
func TestPodRangesOfTheNode(t *testing.T) {
	extra := []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	const shut = `{podSelector: {}}`
	for _, c := range []struct {
		name    string
		unknown policycache.Unknown
		cidrs   string
		specs   []string
		want    string
	}{
		{"by the Node", policycache.Unknown{Guard: true}, "10.0.1.0/24 fd00:1::/64", []string{shut}, "[10.0.1.0/24 fd00:1::/64]"},
		{"by a flag", policycache.Unknown{Guard: true, CIDRs: extra}, "", []string{shut}, "[10.9.0.0/16]"},
		{"by both", policycache.Unknown{Guard: true, CIDRs: extra}, "10.0.1.0/24 10.9.0.0/16", []string{shut}, "[10.9.0.0/16 10.0.1.0/24]"},
		{"no range", policycache.Unknown{Guard: true}, "", []string{shut}, "[]"},
		{"no policy", policycache.Unknown{Guard: true, CIDRs: extra}, "10.0.1.0/24", nil, "[]"},
		{"not at all", policycache.Unknown{CIDRs: extra}, "10.0.1.0/24", []string{shut}, "[]"},
	} {
		o := town(t, c.specs...)
		for _, text := range strings.Fields(c.cidrs) {
			o.Nodes["n1"].PodCIDRs = append(o.Nodes["n1"].PodCIDRs, netip.MustParsePrefix(text))
		}
		compiler := policycache.NewCompiler("n1", quiet)
		compiler.SetUnknown(c.unknown)
		s := compiler.Compile(o)
		if got := fmt.Sprint(s.PodRanges().Prefixes()); got != c.want {
			t.Errorf("%s: ranges %s, want %s", c.name, got, c.want)
		}
		if again := compiler.Compile(o); again.PodRanges() != s.PodRanges() {
			t.Errorf("%s: nothing has changed, but the ranges are others", c.name)
		}
	}
	// What isn't any more is not looked out for any more, and a pod that has ended
	// has no address.
	o := town(t, shut)
	o.Nodes["n1"].PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}
	compiler := policycache.NewCompiler("n1", quiet)
	compiler.SetUnknown(policycache.Unknown{Guard: true})
	s := compiler.Compile(o)
	if got := fmt.Sprint(s.KnownAddrs()); got != "[10.0.1.1 10.0.1.2 10.0.2.1]" || !s.Unknown(o.Pods["c/job"].IPs[0]) {
		t.Errorf("known are %s, and c/job's address is known: %v", got, !s.Unknown(o.Pods["c/job"].IPs[0]))
	}
	delete(o.Policies, "a/p0")
	if s = compiler.Compile(o); s.PodRanges() != nil || s.Unknown(o.Pods["c/job"].IPs[0]) {
		t.Errorf("without a policy: ranges %v", s.PodRanges())
	}
}

// TestGivenAddresses: a pod that its CNI plugin has given an address has it, however
// much another claims it that the API still takes for running.
func TestGivenAddresses(t *testing.T) {
	o := town(t, `{podSelector: {}}`)
	web, db := o.Pods["a/web"], o.Pods["a/db"]
	fresh := *web
	fresh.Name, fresh.Phase, fresh.IPs = "fresh", "Pending", db.IPs[:1]
	o.Pods["a/fresh"] = &fresh
	a := db.IPs[0]
	compiler := policycache.NewCompiler("n1", quiet)
	for _, step := range []struct {
		given, owner, problem string
	}{
		{"", "a/db", "pod a/db: address 10.0.1.1 is also claimed by [a/fresh]; the newest running pod is taken to own it"},
		{"a/fresh", "a/fresh", "pod a/fresh: address 10.0.1.1 is also claimed by [a/db]; the pod that its CNI plugin has given it to is taken to own it"},
		{"a/db", "a/db", "pod a/db: address 10.0.1.1 is also claimed by [a/fresh]; the pod that its CNI plugin has given it to is taken to own it"},
		{"a/another", "a/db", "pod a/db: address 10.0.1.1 is also claimed by [a/fresh]; the newest running pod is taken to own it"},
		{"a/fresh", "a/fresh", "pod a/fresh: address 10.0.1.1 is also claimed by [a/db]; the pod that its CNI plugin has given it to is taken to own it"},
	} {
		next := *o
		next.Given, next.Changed = map[netip.Addr]string{a: step.given}, &policycache.Changed{}
		s := compiler.Compile(&next)
		if got := s.Endpoint(a).Key(); got != step.owner {
			t.Errorf("given to %q: owned by %s", step.given, got)
		}
		if p := compiler.Problems(); len(p) != 1 || p[0].Object+": "+p[0].Err.Error() != step.problem {
			t.Errorf("given to %q: problems %v", step.given, p)
		}
	}
	// The address is the new pod's alone, and its old pod's verdicts are nobody's.
	next := *o
	next.Pods = maps.Clone(o.Pods)
	delete(next.Pods, "a/db")
	if s := compiler.Compile(&next); s.Endpoint(a).Key() != "a/fresh" {
		t.Errorf("owned by %s", s.Endpoint(a).Key())
	}
}

// TestAnotherPodOfTheSameName: a pod that was made anew, with its name and address,
// is another one.
func TestAnotherPodOfTheSameName(t *testing.T) {
	o := town(t, `{podSelector: {}}`)
	compiler := policycache.NewCompiler("n1", quiet)
	before := compiler.Compile(o)
	again := *o.Pods["a/db"]
	again.UID = "another"
	next := *o
	next.Pods = maps.Clone(o.Pods)
	next.Pods["a/db"] = &again
	after := compiler.Compile(&next)
	for _, a := range again.IPs {
		if before.Endpoint(a).Meaning == after.Endpoint(a).Meaning {
			t.Errorf("%s means the same", a)
		}
	}
	if got := len(after.Vacated()); got != 2 || len(before.Vacated()) != 0 {
		t.Errorf("vacated are %v, and before %v", after.Vacated(), before.Vacated())
	}
	var d verdict.Decision
	if d = after.Decide(&verdict.Flow{Src: again.IPs[0], Dst: again.IPs[0]}); d.Src.UID != "another" {
		t.Errorf("judged as %q", d.Src.UID)
	}
}
