package diff

import (
	"cmp"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/policycache"
)

// Difference is one thing that the node has otherwise.
type Difference struct {
	// Part is policies, pods, namespaces, nodes, sets or rules.
	Part string `json:"part"`
	// Object is what it is about, such as "networkpolicy default/db".
	Object string `json:"object"`
	What   string `json:"what"`
	// Since is when the node came to have it so, or, of what it doesn't have, since
	// when it is there; zero if that isn't known.
	Since time.Time `json:"since,omitzero"`
}

// Compare lists what the node has otherwise than the objects say: policies, pods,
// namespaces and nodes as far as policy looks at them, and the sets and rules of its
// kernel.
func Compare(s *State, want *policycache.Objects) []Difference {
	var all []Difference
	add := func(part, object, what string, since time.Time) {
		all = append(all, Difference{part, object, what, since})
	}
	compare(s, policy, "policies", s.Policies, want.Policies, differPolicy, func(p *networkingv1.NetworkPolicy) time.Time { return p.CreationTimestamp.Time }, add)
	compare(s, pod, "pods", s.Pods, want.Pods, differPod, func(p *policycache.Pod) time.Time { return p.Created }, add)
	compare(s, namespace, "namespaces", s.Namespaces, want.Namespaces, differNamespace, nil, add)
	compare(s, node, "nodes", s.Nodes, want.Nodes, differNode, nil, add)
	compareSets(s, want, add)
	for _, f := range s.Faults {
		add("rules", "kernel", f.Text, f.Time)
	}
	return all
}

type adder func(part, object, what string, since time.Time)

// compare goes through the objects of one kind in the order of their names.
func compare[T any](s *State, kind, part string, has, want map[string]*T, differ func(has, want *T) string, created func(*T) time.Time, add adder) {
	keys := slices.Collect(maps.Keys(has))
	for key := range want {
		if has[key] == nil {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		h, w := has[key], want[key]
		switch {
		case h == nil:
			var since time.Time
			if created != nil {
				since = created(w)
			}
			add(part, kind+key, "the node doesn't have it", since)
		case w == nil:
			add(part, kind+key, "only the node has it", s.Since[kind+key])
		default:
			if what := differ(h, w); what != "" {
				add(part, kind+key, what, s.Since[kind+key])
			}
		}
	}
}

// differPolicy compares what the policies say, whatever their versions are.
func differPolicy(has, want *networkingv1.NetworkPolicy) string {
	var fields []string
	for _, f := range []struct {
		name      string
		has, want any
	}{
		{"podSelector", has.Spec.PodSelector, want.Spec.PodSelector}, {"policyTypes", has.Spec.PolicyTypes, want.Spec.PolicyTypes},
		{"ingress", has.Spec.Ingress, want.Spec.Ingress}, {"egress", has.Spec.Egress, want.Spec.Egress},
	} {
		if !same(f.has, f.want) {
			fields = append(fields, "spec."+f.name)
		}
	}
	if len(fields) == 0 {
		return ""
	}
	text := "the node has another " + strings.Join(fields, " and ")
	if has.ResourceVersion != want.ResourceVersion {
		text += fmt.Sprintf(", of resourceVersion %s; it is %s", orNone(has.ResourceVersion), orNone(want.ResourceVersion))
	}
	return text
}

func orNone(version string) string { return cmp.Or(version, "unknown") }

// same compares as JSON, in which what is empty and what is absent are the same to the
// API.
func same(a, b any) bool {
	if isEmpty(a) && isEmpty(b) {
		return true
	}
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && string(x) == string(y)
}

func isEmpty(a any) bool {
	v := reflect.ValueOf(a)
	return (v.Kind() == reflect.Slice || v.Kind() == reflect.Map) && v.Len() == 0
}

func differPod(has, want *policycache.Pod) string {
	var parts []string
	part := func(name string, has, want any) {
		if !same(has, want) {
			parts = append(parts, fmt.Sprintf("%s %s, not %s", name, words(has), words(want)))
		}
	}
	if has.UID != want.UID {
		parts = append(parts, fmt.Sprintf("an earlier pod of that name (UID %s, not %s)", has.UID, want.UID))
	}
	part("addresses", has.IPs, want.IPs)
	part("labels", has.Labels, want.Labels)
	part("node", has.Node, want.Node)
	part("hostNetwork", has.HostNetwork, want.HostNetwork)
	part("ended", has.Ended(), want.Ended())
	part("named ports", has.Ports, want.Ports)
	return theNodeHas(parts)
}

func differNamespace(has, want *policycache.Namespace) string {
	var parts []string
	if !same(has.Labels, want.Labels) {
		parts = append(parts, fmt.Sprintf("labels %s, not %s", words(has.Labels), words(want.Labels)))
	}
	if has.Audit != want.Audit {
		parts = append(parts, fmt.Sprintf("%s=%q, not %q", policycache.AuditAnnotation, has.Audit, want.Audit))
	}
	if has.Mode != want.Mode {
		parts = append(parts, fmt.Sprintf("%s=%q, not %q", policycache.ModeAnnotation, has.Mode, want.Mode))
	}
	if len(parts) == 0 && !same(has, want) {
		parts = append(parts, fmt.Sprintf("%s, not %s", words(has), words(want)))
	}
	return theNodeHas(parts)
}

func differNode(has, want *policycache.Node) string {
	if same(has.Addrs, want.Addrs) {
		return ""
	}
	return theNodeHas([]string{fmt.Sprintf("addresses %s, not %s", words(has.Addrs), words(want.Addrs))})
}

func theNodeHas(parts []string) string {
	if len(parts) == 0 {
		return ""
	}
	return "the node has " + strings.Join(parts, "; ")
}

// words writes a value short enough for a line.
func words(v any) string {
	switch v := v.(type) {
	case string:
		return cmp.Or(v, "none")
	case bool:
		return fmt.Sprint(v)
	}
	if isEmpty(v) {
		return "none"
	}
	text, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// compareSets holds the kernel's sets against whom the objects isolate on the node.
func compareSets(s *State, want *policycache.Objects, add adder) {
	compiled := *want
	compiled.Changed = nil
	snapshot := policycache.NewCompiler(s.Node, slog.New(slog.DiscardHandler)).Compile(&compiled)
	for _, set := range s.Sets {
		if set.Error != "" {
			add("sets", "ipset "+set.Name, set.Error, time.Time{})
			continue
		}
		has := map[netip.Addr]bool{}
		for _, a := range set.Members {
			has[a] = true
		}
		for _, a := range snapshot.IsolatedAddrs() {
			if a.Is6() != set.IPv6 {
				continue
			}
			if !has[a] {
				key := snapshot.Endpoint(a).Key()
				add("sets", "ipset "+set.Name, fmt.Sprintf("%s of pod %s is missing: the pod isn't enforced", a, key), s.Since[pod+key])
			}
			delete(has, a)
		}
		for _, a := range slices.SortedFunc(maps.Keys(has), netip.Addr.Compare) {
			whose, since := "nobody's address", time.Time{}
			if e := snapshot.Endpoint(a); e != nil {
				whose, since = "pod "+e.Key()+", which isn't isolated on this node", s.Since[pod+e.Key()]
			}
			add("sets", "ipset "+set.Name, fmt.Sprintf("%s is in it: %s", a, whose), since)
		}
	}
}

// Lasting keeps those differences that were there before: others are changes that are
// on their way.
func Lasting(before, now []Difference) []Difference {
	lasting := []Difference{}
	for _, d := range now {
		if slices.ContainsFunc(before, func(b Difference) bool { return b.Part == d.Part && b.Object == d.Object }) {
			lasting = append(lasting, d)
		}
	}
	return lasting
}
