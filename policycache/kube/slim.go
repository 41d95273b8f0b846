package kube

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"unique"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"portcullis/policycache"
)

// The resources that are read, by their names in the API.
const (
	pods       = "pods"
	namespaces = "namespaces"
	nodes      = "nodes"
	policies   = "networkpolicies"
)

// slim is what is kept of an API object: its key, and what policy and the log
// need of it. The informer's cache and the state share it.
type slim struct {
	resource        string
	namespace, name string
	uid             types.UID
	version         string
	value           any // *policycache.Pod, Namespace or Node, or *networkingv1.NetworkPolicy
}

// GetObjectMeta lets client-go find the object's key. It is made when asked
// for: a whole ObjectMeta is larger than most of what is kept.
func (s *slim) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: s.namespace, Name: s.name, UID: s.uid, ResourceVersion: s.version}
}

// key is the object's name, with its namespace if it has one.
func (s *slim) key() string {
	if s.namespace == "" {
		return s.name
	}
	return s.namespace + "/" + s.name
}

// same tells whether policy sees no difference between two states of an object.
func (s *slim) same(other *slim) bool {
	if a, ok := s.value.(*networkingv1.NetworkPolicy); ok {
		b := other.value.(*networkingv1.NetworkPolicy)
		return s.uid == other.uid && reflect.DeepEqual(a.Spec, b.Spec)
	}
	return reflect.DeepEqual(s.value, other.value)
}

// transform makes an API object slim, before the informer keeps it. It leaves
// alone what is slim already, since client-go may hand an object over twice.
func transform(object any) (any, error) {
	switch o := object.(type) {
	case *slim:
		return o, nil
	case *corev1.Pod:
		p := policycache.PodFrom(o)
		p.Namespace, p.Node, p.Phase = shared(p.Namespace), shared(p.Node), shared(p.Phase)
		p.Labels, p.Workload = sharedMap(p.Labels), shared(p.Workload)
		p.IPs, p.HostIPs, p.Ports = slices.Clip(p.IPs), slices.Clip(p.HostIPs), slices.Clip(p.Ports)
		for i := range p.Ports {
			p.Ports[i].Name = shared(p.Ports[i].Name)
		}
		return keep(pods, &o.ObjectMeta, p), nil
	case *corev1.Namespace:
		n := policycache.NamespaceFrom(o)
		n.Labels, n.Audit, n.Mode = sharedMap(n.Labels), shared(n.Audit), shared(n.Mode)
		return keep(namespaces, &o.ObjectMeta, n), nil
	case *corev1.Node:
		return keep(nodes, &o.ObjectMeta, policycache.NodeFrom(o)), nil
	case *networkingv1.NetworkPolicy:
		p := &networkingv1.NetworkPolicy{Spec: o.Spec}
		p.Namespace, p.Name, p.UID, p.ResourceVersion, p.CreationTimestamp = o.Namespace, o.Name, o.UID, o.ResourceVersion, o.CreationTimestamp
		return keep(policies, &o.ObjectMeta, p), nil
	case cache.DeletedFinalStateUnknown:
		return o, nil
	}
	return nil, fmt.Errorf("an object of type %T was not asked for", object)
}

func keep(resource string, meta *metav1.ObjectMeta, value any) *slim {
	return &slim{
		resource:  resource,
		namespace: shared(meta.Namespace), name: meta.Name,
		uid: meta.UID, version: meta.ResourceVersion,
		value: value,
	}
}

// shared gives the one copy of a string that is equal in many objects. Each
// decoded object has its own otherwise.
func shared(s string) string { return unique.Make(s).Value() }

func sharedMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	small := make(map[string]string, len(m))
	for k, v := range m {
		small[shared(k)] = shared(v)
	}
	return small
}

// state is the cluster as far as it has been told, by resource and key. It
// belongs to whoever holds its lock.
type state struct {
	known map[string]map[string]*slim
	// changed has, by resource, the keys of what has changed since the state
	// was last taken; nothing before the first time.
	changed map[string]map[string]bool
	taken   *policycache.Objects // nil before the first time
}

func newState() state {
	return state{
		known:   map[string]map[string]*slim{pods: {}, namespaces: {}, nodes: {}, policies: {}},
		changed: map[string]map[string]bool{pods: {}, namespaces: {}, nodes: {}, policies: {}},
	}
}

// set puts an object in and tells whether that changes anything.
func (s *state) set(o *slim) bool {
	key := o.key()
	before := s.known[o.resource][key]
	if before != nil && before.same(o) {
		return false
	}
	s.known[o.resource][key] = o
	s.note(o.resource, key)
	return true
}

// remove takes an object out and tells whether it was there.
func (s *state) remove(resource, key string) bool {
	_, ok := s.known[resource][key]
	delete(s.known[resource], key)
	s.note(resource, key)
	return ok
}

func (s *state) note(resource, key string) {
	if s.taken != nil {
		s.changed[resource][key] = true
	}
}

// take gives the state for a compile, which goes on while the state changes. All
// but the first name what has changed, and share with the one before the objects
// of resources of which nothing has.
func (s *state) take() *policycache.Objects {
	if s.taken == nil {
		s.taken = &policycache.Objects{
			Pods:       values[policycache.Pod](s.known[pods]),
			Namespaces: values[policycache.Namespace](s.known[namespaces]),
			Nodes:      values[policycache.Node](s.known[nodes]),
			Policies:   values[networkingv1.NetworkPolicy](s.known[policies]),
		}
		return s.taken
	}
	o := &policycache.Objects{Changed: &policycache.Changed{}}
	o.Pods, o.Changed.Pods = following(s, pods, s.taken.Pods)
	o.Namespaces, o.Changed.Namespaces = following(s, namespaces, s.taken.Namespaces)
	o.Nodes, o.Changed.Nodes = following(s, nodes, s.taken.Nodes)
	o.Policies, o.Changed.Policies = following(s, policies, s.taken.Policies)
	s.taken = o
	return o
}

func values[T any](objects map[string]*slim) map[string]*T {
	all := make(map[string]*T, len(objects))
	for key, o := range objects {
		all[key] = o.value.(*T)
	}
	return all
}

// following gives what follows the objects taken before, and what has changed.
func following[T any](s *state, resource string, before map[string]*T) (map[string]*T, []string) {
	if len(s.changed[resource]) == 0 {
		return before, nil
	}
	now := maps.Clone(before)
	var changed []string
	for key := range s.changed[resource] {
		changed = append(changed, key)
		if o := s.known[resource][key]; o != nil {
			now[key] = o.value.(*T)
		} else {
			delete(now, key)
		}
	}
	s.changed[resource] = map[string]bool{}
	return now, changed
}
