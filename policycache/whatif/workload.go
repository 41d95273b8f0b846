package whatif

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/policycache"
	"portcullis/verdict"
)

// group is the pods of one namespace that NetworkPolicy can't be meant to tell
// apart: those with the same labels but for policycache.OwnLabels.
type group struct {
	namespace string
	labels    map[string]string
	pods      []string // their names, sorted
	name      string   // of the workload, or else of the first pod
	selector  *metav1.LabelSelector
}

func (g *group) String() string { return g.namespace + "/" + g.name }

// workloads are a state's pods by the group that they are of, without those of
// their node's network, which policies can't select.
type workloads struct {
	groups map[string]*group // by the pod's "namespace/name"
	// first is the first pod by name of each workload ("namespace/workload").
	first map[string]member
}

// member is a pod of a workload, and the form in which its pods are named.
type member struct {
	key  string // "namespace/name"
	form *regexp.Regexp
}

func newWorkloads(o *policycache.Objects) workloads {
	w := workloads{groups: map[string]*group{}, first: map[string]member{}}
	byLabels := map[string]*group{}
	for _, key := range slices.Sorted(maps.Keys(o.Pods)) {
		p := o.Pods[key]
		name, form := workloadName(p)
		if of := p.Namespace + "/" + name; form != nil && w.first[of].form == nil {
			w.first[of] = member{key, form}
		}
		if p.HostNetwork {
			continue
		}
		labels := maps.Clone(p.Labels)
		maps.DeleteFunc(labels, func(k, _ string) bool { return slices.Contains(policycache.OwnLabels, k) })
		text := fmt.Sprintf("%s %q", p.Namespace, labels) // fmt sorts keys
		g := byLabels[text]
		if g == nil {
			g = &group{namespace: p.Namespace, labels: labels, name: name}
			byLabels[text] = g
		}
		g.pods = append(g.pods, p.Name)
		w.groups[key] = g
	}
	byNamespace := map[string][]*group{}
	for _, text := range slices.Sorted(maps.Keys(byLabels)) {
		g := byLabels[text]
		byNamespace[g.namespace] = append(byNamespace[g.namespace], g)
	}
	for _, groups := range byNamespace {
		for _, g := range groups {
			g.selector = exactSelector(g, groups)
		}
	}
	return w
}

// exactSelector gives a selector that matches the group's labels and those of
// no other group of the namespace: the labels themselves, and for groups that
// have more than these a label that must be absent.
func exactSelector(g *group, others []*group) *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	if len(g.labels) > 0 {
		s.MatchLabels = g.labels
	}
	absent := map[string]bool{}
	for _, other := range others {
		more := slices.Sorted(maps.Keys(other.labels))
		more = slices.DeleteFunc(more, func(k string) bool { _, own := g.labels[k]; return own })
		if len(more) == 0 || !includes(other.labels, g.labels) || slices.ContainsFunc(more, func(k string) bool { return absent[k] }) {
			continue
		}
		absent[more[0]] = true
	}
	for _, k := range slices.Sorted(maps.Keys(absent)) {
		s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpDoesNotExist})
	}
	return s
}

func includes(all, some map[string]string) bool {
	for k, v := range some {
		if have, ok := all[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// Controllers name pods after themselves. A Deployment's pods end in its
// ReplicaSet's hash and five characters, a DaemonSet's in five characters, a
// StatefulSet's in a number; none of the characters is a vowel.
var (
	deploymentPod  = regexp.MustCompile(`^(.+)-[bcdfghjklmnpqrstvwxz0-9]{1,10}-[bcdfghjklmnpqrstvwxz0-9]{5}$`)
	daemonSetPod   = regexp.MustCompile(`^(.+)-[bcdfghjklmnpqrstvwxz0-9]{5}$`)
	statefulSetPod = regexp.MustCompile(`^(.+)-[0-9]+$`)
)

// workloadName gives the name of what controls a pod, as its labels and name
// tell, and the form of its pods' names; else its own name and nil.
func workloadName(p *policycache.Pod) (name string, form *regexp.Regexp) {
	switch {
	case p.Labels["pod-template-hash"] != "":
		form = deploymentPod
	case p.Labels["statefulset.kubernetes.io/pod-name"] != "":
		form = statefulSetPod
	case p.Labels["controller-revision-hash"] != "":
		form = daemonSetPod
	default:
		return p.Name, nil
	}
	if m := form.FindStringSubmatch(p.Name); m != nil {
		return m[1], form
	}
	return p.Name, nil
}

// standIn finds a pod, "namespace/name", of the workload that a pod was of
// which has gone; "" if there is none.
func (w *workloads) standIn(namespace, name string) string {
	for _, form := range []*regexp.Regexp{deploymentPod, daemonSetPod, statefulSetPod} {
		m := form.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		if first := w.first[namespace+"/"+m[1]]; first.form == form {
			return first.key
		}
	}
	return ""
}

// described names an address's owner: a pod's workload, if it has one, or the
// pod; else the address, and whose node's it is.
func (s *State) described(a netip.Addr, e *verdict.Endpoint) string {
	if e != nil {
		name, _ := workloadName(s.objects.Pods[e.Key()])
		return e.Namespace + "/" + name
	}
	if node := s.snap.Node(a); node != "" {
		return a.String() + " (node " + node + ")"
	}
	return a.String()
}

func compareGroups(a, b *group) int {
	return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name), strings.Compare(a.pods[0], b.pods[0]))
}
