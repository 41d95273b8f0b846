package policycache

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/verdict"
)

// Problem is something wrong with an object that enforcement goes on in spite
// of: a mistake in a policy on the closed side, an address claimed twice for
// the pod with the better claim.
type Problem struct {
	Object string // such as "networkpolicy default/db"
	Err    error
}

// Compiler turns cluster state into snapshots. It remembers between compiles
// what it has read and built, so that what didn't change isn't done again. It
// belongs to one goroutine.
type Compiler struct {
	node string
	log  *slog.Logger

	generation uint64
	previous   *verdict.Snapshot
	selectors  *selectorIDs
	policies   map[string]*policy // by "namespace/name"
	nextPolicy uint64
	tables     map[string]*verdict.Table
	seed       maphash.Seed

	problems []Problem
	logged   map[string]bool // texts of the problems of the last compile
}

// NewCompiler makes a compiler whose snapshots judge the pods of one node, or
// all pods when node is empty.
func NewCompiler(node string, log *slog.Logger) *Compiler {
	c := &Compiler{node: node, log: log, seed: maphash.MakeSeed()}
	c.forget()
	return c
}

// forget drops all that was remembered; the next compile starts afresh.
func (c *Compiler) forget() {
	c.selectors = newSelectorIDs()
	c.policies = map[string]*policy{}
	c.tables = map[string]*verdict.Table{}
}

// Problems lists what was wrong with the objects of the last compile, in the
// order of their names.
func (c *Compiler) Problems() []Problem { return c.problems }

// compilation is the work of one compile.
type compilation struct {
	*Compiler
	objects    *Objects
	namespaces *labelIndex
	pods       *labelIndex
	nsIndex    map[string]uint32
	audits     map[string]verdict.Audit // by namespace, where one asks for something
	byNS       map[string][]*policy     // sorted by name
	bits       []verdict.Bits           // of selectors over pod label sets
	nsBits     []verdict.Bits           // of selectors over namespaces
	subjects   map[subjectKey]subject
	used       map[string]*verdict.Table
	problems   []Problem
}

// Compile makes the snapshot of a state. It is the caller's to swap in.
func (c *Compiler) Compile(o *Objects) *verdict.Snapshot {
	w := &compilation{
		Compiler:   c,
		objects:    o,
		namespaces: newLabelIndex(),
		pods:       newLabelIndex(),
		nsIndex:    map[string]uint32{},
		audits:     map[string]verdict.Audit{},
		byNS:       map[string][]*policy{},
		subjects:   map[subjectKey]subject{},
		used:       map[string]*verdict.Table{},
	}
	w.readPolicies()
	owners := w.ownAddresses()
	w.numberNamespaces()
	pods := w.numberPods(owners)
	w.matchSelectors()
	in := verdict.Input{
		Generation:    c.generation + 1,
		Owners:        map[netip.Addr]*verdict.Endpoint{},
		Nodes:         w.nodeAddresses(),
		NamespaceBits: w.nsBits,
		PodBits:       w.bits,
		Versions:      w.versions(),
	}
	endpoints := make(map[*Pod]*verdict.Endpoint, len(pods))
	for addr, pod := range owners {
		e := endpoints[pod]
		if e == nil {
			e = w.endpoint(pod, pods[pod])
			endpoints[pod] = e
		}
		in.Owners[addr] = e
	}
	c.generation++
	c.previous = verdict.NewSnapshot(in, c.previous)
	c.tables = w.used
	c.report(w.problems)
	return c.previous
}

// readPolicies reads the policies that weren't read before and sorts all by
// namespace and name. It starts afresh when most of the selectors it remembers
// are of policies long gone.
func (w *compilation) readPolicies() {
	if len(w.selectors.selectors) > 1000+4*w.selectorsInUse() {
		w.forget()
	}
	read := make(map[string]*policy, len(w.objects.Policies))
	for _, np := range w.objects.Policies {
		p := w.readPolicy(np)
		read[p.name] = p
		w.byNS[p.namespace] = append(w.byNS[p.namespace], p)
		if p.err != nil {
			w.problems = append(w.problems, Problem{Object: "networkpolicy " + p.name, Err: p.err})
		}
	}
	w.policies = read
	for _, list := range w.byNS {
		slices.SortFunc(list, func(a, b *policy) int { return cmp.Compare(a.name, b.name) })
	}
}

// readPolicy gives a policy as it was read before if it says the same, even
// when its object is a new one (a file was written again, a watch began anew):
// then its tables and all that was cached by them stay.
func (w *compilation) readPolicy(np *networkingv1.NetworkPolicy) *policy {
	if p := w.policies[policyName(np)]; p != nil && (p.source == np || reflect.DeepEqual(p.source.Spec, np.Spec)) {
		p.source = np
		return p
	}
	w.nextPolicy++
	return readPolicy(np, w.nextPolicy, w.selectors)
}

// selectorsInUse is an upper bound of the selectors that remembered policies
// name.
func (w *compilation) selectorsInUse() int {
	n := 0
	for _, p := range w.policies {
		n++
		for _, r := range p.ingressRules {
			n += 2 * len(r.Selectors)
		}
		for _, r := range p.egressRules {
			n += 2 * len(r.Selectors)
		}
	}
	return n
}

// numberNamespaces gives every namespace that exists or is named an index.
func (w *compilation) numberNamespaces() {
	add := func(name string, set map[string]string) {
		if _, ok := w.nsIndex[name]; ok {
			return
		}
		// Every namespace has this label with its own name; a manifest can't
		// claim another's.
		own := maps.Clone(set)
		if own == nil {
			own = map[string]string{}
		}
		own[corev1.LabelMetadataName] = name
		w.nsIndex[name] = w.namespaces.id(own)
	}
	for _, ns := range w.objects.Namespaces {
		add(ns.Name, ns.Labels)
		w.readAudit(ns)
	}
	for _, pod := range w.objects.Pods {
		add(pod.Namespace, nil)
	}
}

// readAudit reads what a namespace asks of the decision log. What can't be
// understood leaves it to the agent's flag.
func (w *compilation) readAudit(ns *Namespace) {
	audit, ok := verdict.ParseAudit(ns.Audit)
	if !ok {
		w.problems = append(w.problems, Problem{Object: "namespace " + ns.Name, Err: fmt.Errorf("annotation %s: %q is not all, denied or none", AuditAnnotation, ns.Audit)})
	}
	if audit != verdict.AuditDefault {
		w.audits[ns.Name] = audit
	}
}

// versions gives each policy's resourceVersion, where it has one. Nothing is
// compiled anew for another one.
func (w *compilation) versions() map[string]string {
	versions := map[string]string{}
	for name, p := range w.policies {
		if p.source.ResourceVersion != "" {
			versions[name] = p.source.ResourceVersion
		}
	}
	return versions
}

// numberPods gives the pods that own an address the index of their label set.
func (w *compilation) numberPods(owners map[netip.Addr]*Pod) map[*Pod]uint32 {
	index := map[*Pod]uint32{}
	for _, pod := range owners {
		if _, ok := index[pod]; !ok {
			index[pod] = w.pods.id(pod.Labels)
		}
	}
	return index
}

// matchSelectors finds what each selector matches, among the pods' label sets
// and among the namespaces. A selector may serve as both.
func (w *compilation) matchSelectors() {
	n := len(w.selectors.selectors)
	w.bits, w.nsBits = make([]verdict.Bits, n), make([]verdict.Bits, n)
	asPods, asNamespaces := w.selectorRoles(n)
	for i, selector := range w.selectors.selectors {
		if asPods[i] {
			w.bits[i] = w.pods.match(selector)
		}
		if asNamespaces[i] {
			w.nsBits[i] = w.namespaces.match(selector)
		}
	}
}

// selectorRoles tells which selectors the policies of now use, and on what.
func (w *compilation) selectorRoles(n int) (asPods, asNamespaces []bool) {
	asPods, asNamespaces = make([]bool, n), make([]bool, n)
	for _, p := range w.policies {
		asPods[p.selector] = true
		for _, rules := range [2][]verdict.Rule{p.ingressRules, p.egressRules} {
			for i := range rules {
				for _, s := range rules[i].Selectors {
					asNamespaces[s.Namespace] = true
					asPods[s.Pod] = true
				}
			}
		}
	}
	return asPods, asNamespaces
}

// endpoint makes what decisions need of a pod.
func (w *compilation) endpoint(pod *Pod, labelsIndex uint32) *verdict.Endpoint {
	s := w.subject(pod.Namespace, labelsIndex)
	e := &verdict.Endpoint{
		Namespace:      pod.Namespace,
		Name:           pod.Name,
		Node:           pod.Node,
		Addrs:          pod.IPs,
		Judged:         w.node == "" || pod.Node == w.node,
		NamespaceIndex: w.nsIndex[pod.Namespace],
		LabelsIndex:    labelsIndex,
		Ports:          pod.Ports,
		Labels:         pod.Labels,
		Workload:       pod.Workload,
		Audit:          w.audits[pod.Namespace],
	}
	var h maphash.Hash
	h.SetSeed(w.seed)
	if e.Judged {
		var ingressKey, egressKey string
		e.Ingress, ingressKey = w.ingressTable(s, pod.Ports)
		e.Egress, egressKey = w.egressTable(s)
		writeAll(&h, ingressKey, egressKey)
	}
	writeAll(&h, pod.UID, pod.Namespace, pod.Name, pod.Node)
	writeAll(&h, w.namespaces.texts[e.NamespaceIndex], w.pods.texts[labelsIndex])
	for _, a := range pod.IPs {
		writeAll(&h, a.String())
	}
	for _, p := range pod.Ports {
		writeAll(&h, p.Name, p.Proto.String(), string(binary.BigEndian.AppendUint16(nil, p.Port)))
	}
	e.Meaning = h.Sum64()
	return e
}

// writeAll hashes texts so that where one ends and the next begins matters.
func writeAll(h *maphash.Hash, texts ...string) {
	for _, t := range texts {
		var length [8]byte
		binary.BigEndian.PutUint64(length[:], uint64(len(t)))
		h.Write(length[:])
		h.WriteString(t)
	}
}

// report keeps the problems, and logs those that the compile before didn't
// have.
func (c *Compiler) report(problems []Problem) {
	slices.SortFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Err.Error(), b.Err.Error()))
	})
	now := map[string]bool{}
	for _, p := range problems {
		text := fmt.Sprintf("%s: %v", p.Object, p.Err)
		now[text] = true
		if !c.logged[text] {
			c.log.Warn("something is wrong with an object, enforcement goes on", "object", p.Object, "err", p.Err)
		}
	}
	c.problems, c.logged = problems, now
}
