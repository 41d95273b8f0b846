package policycache

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/verdict"
)

// namespace is a namespace that exists, or that pods or policies are in.
type namespace struct {
	name     string
	object   *Namespace // nil when it isn't known
	labels   uint32     // its label set, with its own name in it
	audit    verdict.Audit
	mode     verdict.Mode
	subjects map[uint32]*subject
	policies []*policy // sorted by name
	pods     int
}

// pod is a pod and what was made of it.
type pod struct {
	*Pod
	subject         *subject // nil for one that claims no address
	ingress, egress *table   // nil for none
	endpoint        *verdict.Endpoint
	stale           bool // is in compilation.stalePods
}

// difference finds out what differs from the state before by comparing
// pointers: an object that is handed over never changes.
func (c *Compiler) difference(o *Objects) *Changed {
	return &Changed{
		Pods:       differing(c.pods, o.Pods, func(p *pod) *Pod { return p.Pod }),
		Namespaces: differing(c.namespaces, o.Namespaces, func(n *namespace) *Namespace { return n.object }),
		Nodes:      differing(c.nodes, o.Nodes, func(n *Node) *Node { return n }),
		Policies:   differing(c.policies, o.Policies, func(p *policy) *networkingv1.NetworkPolicy { return p.source }),
	}
}

// differing lists the keys of objects that aren't the ones of before.
func differing[K, O any](before map[string]K, now map[string]*O, object func(K) *O) []string {
	var keys []string
	for key, o := range now {
		if b, ok := before[key]; !ok || object(b) != o {
			keys = append(keys, key)
		}
	}
	for key, b := range before {
		if now[key] == nil && object(b) != nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// changeNode takes in a node, nil for one that is gone.
func (w *compilation) changeNode(name string, now *Node) {
	before := w.nodes[name]
	w.changeNodeMode(name, before, now)
	if now != nil {
		w.nodes[name] = now
		w.countNode(now.Name, now, 1)
	} else {
		delete(w.nodes, name)
	}
	if before != nil {
		w.countNode(before.Name, before, -1)
	}
}

func (w *compilation) countNode(name string, n *Node, by int) {
	w.nodeAddrs.add(name, n.Addrs, by, w.nodeAddrChanged)
}

// changeNamespace takes in a namespace, nil for one that is gone.
func (w *compilation) changeNamespace(name string, now *Namespace) {
	n := w.needNamespace(name)
	n.object = now
	var set map[string]string
	var audit, mode string
	if now != nil {
		set, audit, mode = now.Labels, now.Audit, now.Mode
	}
	auditBefore, modeBefore := n.audit, n.mode
	n.audit = readWord(w, annotated{"namespace", name, AuditAnnotation}, audit, verdict.ParseAudit, "all, denied or none")
	n.mode = w.readMode("namespace", name, mode)
	before := n.labels
	n.labels = w.namespaceLabels.addSet(withOwnName(name, set))
	w.namespaceLabels.dropSet(before)
	if n.labels != before || n.audit != auditBefore || n.mode != modeBefore {
		for _, s := range n.subjects {
			w.rebuild(s, func(*pod) bool { return true })
		}
	}
	w.leaveNamespace(n)
}

// withOwnName gives a namespace's labels with the one that every namespace has,
// its own name; a manifest can't claim another's.
func withOwnName(name string, set map[string]string) map[string]string {
	if set[corev1.LabelMetadataName] == name {
		return set
	}
	own := make(map[string]string, len(set)+1)
	maps.Copy(own, set)
	own[corev1.LabelMetadataName] = name
	return own
}

// needNamespace gives a namespace, new if it wasn't there.
func (w *compilation) needNamespace(name string) *namespace {
	n := w.namespaces[name]
	if n == nil {
		n = &namespace{name: name, subjects: map[uint32]*subject{}}
		n.labels = w.namespaceLabels.addSet(withOwnName(name, nil))
		w.namespaces[name] = n
	}
	return n
}

// leaveNamespace drops a namespace that nothing needs.
func (w *compilation) leaveNamespace(n *namespace) {
	if n.object == nil && n.pods == 0 && len(n.policies) == 0 {
		w.namespaceLabels.dropSet(n.labels)
		delete(w.namespaces, n.name)
	}
}

// changePod takes in a pod, nil for one that is gone.
func (w *compilation) changePod(key string, now *Pod) {
	p := w.pods[key]
	var before *Pod
	if p != nil {
		before = p.Pod
	}
	if before == now {
		return
	}
	if p == nil {
		p = &pod{}
		w.pods[key] = p
	}
	left := p.subject
	p.Pod, p.subject = now, nil
	w.stale(p)
	w.claim(p, before, now)
	if now != nil {
		w.nodeAddrs.add(now.Node, now.nodeIPs(), 1, w.nodeAddrChanged)
		if len(now.claimed()) > 0 {
			w.join(p)
		}
	}
	if before != nil {
		w.nodeAddrs.add(before.Node, before.nodeIPs(), -1, w.nodeAddrChanged)
	}
	if left != nil {
		w.leave(left, p)
	}
	if now == nil {
		delete(w.pods, key)
	}
}

// claim replaces a pod's claims to addresses.
func (w *compilation) claim(p *pod, before, now *Pod) {
	rivals := func(a netip.Addr) bool { return len(w.claims.rivals[a]) > 0 }
	for _, a := range before.claimed() {
		w.problemsChanged = w.problemsChanged || rivals(a)
		w.claims.remove(a, p)
		w.staleAddrs = append(w.staleAddrs, a)
	}
	for _, a := range now.claimed() {
		w.claims.add(a, p)
		w.staleAddrs = append(w.staleAddrs, a)
	}
}

// changePolicy takes in a policy, nil for one that is gone. One that says the
// same stays, even when its object is a new one (a file was written again, a
// watch began anew): then its tables and all that was cached by them stay.
func (w *compilation) changePolicy(key string, np *networkingv1.NetworkPolicy) {
	before := w.policies[key]
	if before != nil && np != nil && (before.source == np || reflect.DeepEqual(before.source.Spec, np.Spec)) {
		before.source = np
		return
	}
	var now *policy
	var n *namespace
	if np != nil {
		now = w.readPolicy(np)
		w.work.Policies++
		w.policies[key] = now
		n = w.needNamespace(now.namespace)
		n.policies = insertPolicy(n.policies, now)
		w.mistakes(now, true)
	} else {
		delete(w.policies, key)
	}
	if before != nil {
		n = w.needNamespace(before.namespace)
		n.policies = removePolicy(n.policies, before)
		w.mistakes(before, false)
	}
	if n == nil {
		return
	}
	for _, s := range n.subjects {
		if s.replace(before, now, w.podLabels) {
			w.rebuild(s, w.judges)
		}
	}
	if before != nil {
		w.dropPolicy(before)
	}
	w.leaveNamespace(n)
}

// mistakes notes that a policy with mistakes has come, or gone.
func (w *compilation) mistakes(p *policy, come bool) {
	if p.err == nil {
		return
	}
	w.problemsChanged = true
	if come {
		w.invalid[p] = true
	} else {
		delete(w.invalid, p)
	}
}

// rebuild has the endpoints of those of a subject's pods made anew that are
// concerned.
func (w *compilation) rebuild(s *subject, concerned func(*pod) bool) {
	for _, p := range s.pods {
		if concerned(p) {
			w.stale(p)
		}
	}
}

// stale has a pod's endpoint made anew.
func (w *compilation) stale(p *pod) {
	if !p.stale {
		p.stale = true
		w.stalePods = append(w.stalePods, p)
	}
}

// judges tells whether this compiler's snapshots decide for a pod: only those pods
// have tables, and policies mean nothing to the others.
func (c *Compiler) judges(p *pod) bool { return c.node == "" || p.Node == c.node }

func (w *compilation) nodeAddrChanged(a netip.Addr) { w.staleNodeAddrs[a] = true }

// insertPolicy puts a policy into a list that is sorted by name.
func insertPolicy(list []*policy, p *policy) []*policy {
	at, _ := slices.BinarySearchFunc(list, p, func(a, b *policy) int { return cmp.Compare(a.name, b.name) })
	return slices.Insert(list, at, p)
}

func removePolicy(list []*policy, p *policy) []*policy {
	return slices.DeleteFunc(list, func(other *policy) bool { return other == p })
}
