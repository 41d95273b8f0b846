package diff

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/policycache"
)

var then = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func objects() *policycache.Objects {
	o := policycache.NewObjects()
	o.Namespaces["a"] = &policycache.Namespace{Name: "a", Labels: map[string]string{"kubernetes.io/metadata.name": "a"}}
	o.Nodes["n1"] = &policycache.Node{Name: "n1", Addrs: []netip.Addr{netip.MustParseAddr("192.168.0.1")}}
	for name, ip := range map[string]string{"db": "10.0.0.1", "web": "10.0.0.2"} {
		o.Pods["a/"+name] = &policycache.Pod{Namespace: "a", Name: name, UID: "u-" + name, Node: "n1", Phase: "Running",
			Labels: map[string]string{"app": name}, IPs: []netip.Addr{netip.MustParseAddr(ip), netip.MustParseAddr("fd00::" + ip[7:])}, Created: then}
	}
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "db", ResourceVersion: "7", CreationTimestamp: metav1.NewTime(then)}}
	p.Spec.PodSelector.MatchLabels = map[string]string{"app": "db"}
	o.Policies["a/db"] = p
	return o
}

func addrs(texts ...string) (all []netip.Addr) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

// state is that of an agent that has it all right, as it comes over its socket.
func state(t *testing.T) *State {
	t.Helper()
	s := &State{Node: "n1", Sets: []Set{{Name: "portcullis-4", Members: addrs("10.0.0.1")}, {Name: "portcullis-6", IPv6: true, Members: addrs("fd00::1")}}}
	s.Put(objects())
	var times Times
	times.Note(objects(), then.Add(time.Minute))
	s.Since = times.Since()
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	read := new(State)
	if err := json.Unmarshal(text, read); err != nil {
		t.Fatal(err)
	}
	return read
}

// TestCompare changes one thing at a time, and names it.
func TestCompare(t *testing.T) {
	noted := then.Add(time.Minute)
	for _, row := range []struct {
		name  string
		alter func(*State, *policycache.Objects)
		want  Difference // What is the beginning
	}{
		{"a policy is missing", func(s *State, _ *policycache.Objects) { delete(s.Policies, "a/db") }, Difference{"policies", "networkpolicy a/db", "the node doesn't have it", then}},
		{"a policy is left over", func(_ *State, o *policycache.Objects) {
			p := o.Policies["a/db"].DeepCopy()
			p.Name = "db2"
			o.Policies = map[string]*networkingv1.NetworkPolicy{"a/db2": p}
		}, Difference{"policies", "networkpolicy a/db", "only the node has it", noted}},
		{"another spec", func(_ *State, o *policycache.Objects) {
			o.Policies["a/db"].ResourceVersion = "9"
			o.Policies["a/db"].Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{}}
		}, Difference{"policies", "networkpolicy a/db", "the node has another spec.ingress, of resourceVersion 7; it is 9", noted}},
		{"a pod's labels", func(_ *State, o *policycache.Objects) { o.Pods["a/web"].Labels = nil },
			Difference{"pods", "pod a/web", `the node has labels {"app":"web"}, not none`, noted}},
		{"a pod's address", func(_ *State, o *policycache.Objects) { o.Pods["a/web"].IPs = addrs("10.0.0.9") },
			Difference{"pods", "pod a/web", `the node has addresses ["10.0.0.2","fd00::2"], not ["10.0.0.9"]`, noted}},
		{"a pod that ended", func(_ *State, o *policycache.Objects) { o.Pods["a/web"].Phase = "Succeeded" }, Difference{"pods", "pod a/web", "the node has ended false, not true", noted}},
		{"another pod of the name", func(s *State, _ *policycache.Objects) { s.Pods["a/web"].UID = "old" },
			Difference{"pods", "pod a/web", "the node has an earlier pod of that name (UID old, not u-web)", noted}},
		{"a namespace's labels", func(_ *State, o *policycache.Objects) { o.Namespaces["a"].Labels["x"] = "y" }, Difference{"namespaces", "namespace a", "the node has labels ", noted}},
		{"a namespace's annotation", func(_ *State, o *policycache.Objects) { o.Namespaces["a"].Audit = "none" },
			Difference{"namespaces", "namespace a", `the node has portcullis.dev/audit="", not "none"`, noted}},
		{"a node's address", func(_ *State, o *policycache.Objects) { o.Nodes["n1"].Addrs = nil }, Difference{"nodes", "node n1", `the node has addresses ["192.168.0.1"], not none`, noted}},
		{"a member too few", func(s *State, _ *policycache.Objects) { s.Sets[0].Members = nil },
			Difference{"sets", "ipset portcullis-4", "10.0.0.1 of pod a/db is missing: the pod isn't enforced", noted}},
		{"a member too many", func(s *State, _ *policycache.Objects) { s.Sets[1].Members = addrs("fd00::1", "fd00::2") },
			Difference{"sets", "ipset portcullis-6", "fd00::2 is in it: pod a/web, which isn't isolated on this node", noted}},
		{"a stranger", func(s *State, _ *policycache.Objects) { s.Sets[0].Members = addrs("10.0.0.1", "10.9.9.9") },
			Difference{"sets", "ipset portcullis-4", "10.9.9.9 is in it: nobody's address", time.Time{}}},
		{"no set", func(s *State, _ *policycache.Objects) { s.Sets[0] = Set{Name: "portcullis-4", Error: "it is gone"} }, Difference{"sets", "ipset portcullis-4", "it is gone", time.Time{}}},
		{"the rules", func(s *State, _ *policycache.Objects) { s.Faults = []Finding{{"IPv4: chain X was gone", then}} }, Difference{"rules", "kernel", "IPv4: chain X was gone", then}},
	} {
		s, o := state(t), objects()
		row.alter(s, o)
		got := Compare(s, o)
		if row.name == "a policy is left over" {
			got = got[:1] // and one is missing in its place
		}
		if len(got) != 1 || !strings.HasPrefix(got[0].What, row.want.What) {
			t.Errorf("%s: %+v, want %+v", row.name, got, row.want)
			continue
		}
		row.want.What = got[0].What
		if d := got[0]; d.Part != row.want.Part || d.Object != row.want.Object || !d.Since.Equal(row.want.Since) {
			t.Errorf("%s: %+v, want %+v", row.name, d, row.want)
		}
	}
}

// What policy doesn't look at is no difference, and neither is what the API has no
// difference between.
func TestCompareSame(t *testing.T) {
	s, o := state(t), objects()
	o.Policies["a/db"].ResourceVersion = "8"
	o.Policies["a/db"].Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{}
	o.Pods["a/web"].Phase = "Pending"
	o.Pods["a/web"].Ports = nil
	o.Changed = &policycache.Changed{} // as it comes from a watch
	if got := Compare(s, o); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

func TestLasting(t *testing.T) {
	a, b, c := Difference{Object: "a"}, Difference{Object: "b"}, Difference{Object: "c"}
	if got := Lasting([]Difference{a, b}, []Difference{b, c}); len(got) != 1 || got[0] != b {
		t.Errorf("%+v", got)
	}
}

// TestTimes: an object keeps its time for as long as it is the same, with and without
// word of what has changed.
func TestTimes(t *testing.T) {
	var times Times
	first := objects()
	times.Note(first, then)
	next := *first
	next.Pods = map[string]*policycache.Pod{"a/web": first.Pods["a/web"], "a/new": {Namespace: "a", Name: "new"}}
	next.Changed = &policycache.Changed{Pods: []string{"a/db", "a/web", "a/new"}}
	times.Note(&next, then.Add(time.Hour))
	last := next
	last.Changed = nil
	last.Namespaces = map[string]*policycache.Namespace{"a": {Name: "a"}}
	times.Note(&last, then.Add(2*time.Hour))
	got := times.Since()
	want := map[string]time.Time{"pod a/web": then, "pod a/new": then.Add(time.Hour), "namespace a": then.Add(2 * time.Hour), "node n1": then, "networkpolicy a/db": then}
	if len(got) != len(want) {
		t.Errorf("%v", got)
	}
	for key, at := range want {
		if !got[key].Equal(at) {
			t.Errorf("%s: %s, want %s", key, got[key], at)
		}
	}
}
