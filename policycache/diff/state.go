// Package diff says where what a node believes of its cluster, and what its kernel
// holds, differs from what the API server or a directory says. It does no I/O.
package diff

import (
	"net/netip"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/policycache"
)

// State is what a node believes and what is in its kernel. Its JSON is what an agent
// answers.
type State struct {
	Node string `json:"node"`
	// Time is when it was said.
	Time time.Time `json:"time"`
	// Generation is that of the policy in force, Applied since when it is.
	Generation uint64    `json:"generation"`
	Applied    time.Time `json:"applied"`

	Pods       map[string]*policycache.Pod            `json:"pods"`
	Namespaces map[string]*policycache.Namespace      `json:"namespaces"`
	Nodes      map[string]*policycache.Node           `json:"nodes"`
	Policies   map[string]*networkingv1.NetworkPolicy `json:"policies"`
	// Since is when the node came to have each object as it has it, by kind and key:
	// "pod default/web".
	Since map[string]time.Time `json:"since"`

	Sets []Set `json:"sets"`
	// Faults is what is wrong with the rules now, and Repaired what the agent found
	// wrong lately and put right.
	Faults   []Finding `json:"faults"`
	Repaired []Finding `json:"repaired"`
}

// Set is an ipset of the kernel, which has to hold the addresses of one family of
// the node's isolated pods.
type Set struct {
	Name    string       `json:"name"`
	IPv6    bool         `json:"ipv6"`
	Members []netip.Addr `json:"members"`
	// Error is why it can't be read.
	Error string `json:"error,omitempty"`
}

// Finding is something wrong in the kernel, and since when or at what time that was
// found.
type Finding struct {
	Text string    `json:"text"`
	Time time.Time `json:"time"`
}

// Put takes a state's objects in.
func (s *State) Put(o *policycache.Objects) {
	s.Pods, s.Namespaces, s.Nodes, s.Policies = o.Pods, o.Namespaces, o.Nodes, o.Policies
}

// Times remembers when each object came to be as it is. It belongs to one goroutine.
type Times struct {
	last  *policycache.Objects
	since map[string]time.Time
}

// The kinds of objects, as they are named.
const (
	pod       = "pod "
	namespace = "namespace "
	node      = "node "
	policy    = "networkpolicy "
)

// Note takes in the state that has been put in force now. States that follow each
// other share the objects that are the same.
func (t *Times) Note(o *policycache.Objects, now time.Time) {
	if t.last == nil {
		t.last, t.since = policycache.NewObjects(), map[string]time.Time{}
		all := *o
		all.Changed = nil
		o = &all
	}
	changed := o.Changed
	if changed == nil {
		changed = &policycache.Changed{Pods: differing(t.last.Pods, o.Pods), Namespaces: differing(t.last.Namespaces, o.Namespaces),
			Nodes: differing(t.last.Nodes, o.Nodes), Policies: differing(t.last.Policies, o.Policies)}
	}
	note(t.since, pod, changed.Pods, t.last.Pods, o.Pods, now)
	note(t.since, namespace, changed.Namespaces, t.last.Namespaces, o.Namespaces, now)
	note(t.since, node, changed.Nodes, t.last.Nodes, o.Nodes, now)
	note(t.since, policy, changed.Policies, t.last.Policies, o.Policies, now)
	t.last = o
}

// Since gives a copy of the times.
func (t *Times) Since() map[string]time.Time {
	since := make(map[string]time.Time, len(t.since))
	for k, v := range t.since {
		since[k] = v
	}
	return since
}

func differing[T any](before, now map[string]*T) (keys []string) {
	for key, object := range now {
		if before[key] != object {
			keys = append(keys, key)
		}
	}
	for key := range before {
		if now[key] == nil {
			keys = append(keys, key)
		}
	}
	return keys
}

func note[T any](since map[string]time.Time, kind string, keys []string, before, now map[string]*T, at time.Time) {
	for _, key := range keys {
		switch object := now[key]; {
		case object == nil:
			delete(since, kind+key)
		case before[key] != object:
			since[kind+key] = at
		}
	}
}
