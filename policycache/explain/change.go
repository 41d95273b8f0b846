package explain

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/policycache"
	"portcullis/verdict"
)

// Change is a small change of one policy by which one direction of a denied
// connection would be admitted.
type Change struct {
	// Direction is egress or ingress.
	Direction string
	// Why says what is missing, in words.
	Why string
	// Policy is the "namespace/name" of the policy that is changed. If New, there is
	// none of that name yet.
	Policy string
	New    bool
	// Path and Value are what is added to the policy and where, as a JSON patch's add
	// (RFC 6902) has it; of a new one the whole is added.
	Path  string
	Value any
	// Note says what is admitted besides; empty if nothing is.
	Note string
	// Changed is the policy with it.
	Changed *networkingv1.NetworkPolicy
}

// Changes gives for each direction that has no rule for the connection the smallest
// change that admits it, as far as there is one.
//
// If a rule lacks nothing but the peer, and names that port alone, the peer is added
// to it; if it lacks nothing but the port, and names its peers, the port is. Else it
// takes another rule, of this peer and this port, in the isolating policy that selects
// the fewest pods, or in a new policy if that one selects its whole namespace. A peer
// is the pods of its namespace that have its labels, or its address.
func (c *Cluster) Changes(a *Answer) []Change {
	if a.Decision.Reason != verdict.ReasonNoRule {
		return nil
	}
	var all []Change
	for _, d := range []struct {
		direction     string
		side          *verdict.Side
		subject, peer netip.Addr
	}{
		{"egress", &a.Decision.Egress, a.Flow.Src, a.Flow.Dst},
		{"ingress", &a.Decision.Ingress, a.Flow.Dst, a.Flow.Src},
	} {
		if !d.side.Isolated || d.side.Verdict == verdict.Allow {
			continue
		}
		s := c.newSearch(a, d.direction, d.subject, d.peer)
		if s == nil {
			continue
		}
		if change := s.find(d.side.Policies()); change != nil {
			all = append(all, *change)
		}
	}
	return all
}

// search looks for the change of one direction.
type search struct {
	cluster   *Cluster
	flow      verdict.Flow
	direction string
	subject   *policycache.Pod
	peer      *policycache.Pod // nil for an address that is no pod's to policy
	peerAddr  netip.Addr
	few       *policycache.Objects // the two ends and no policy
}

func (c *Cluster) newSearch(a *Answer, direction string, subject, peer netip.Addr) *search {
	s := &search{cluster: c, flow: a.Flow, direction: direction, peerAddr: peer, few: policycache.NewObjects()}
	s.subject, s.peer = c.podAt(subject), c.podAt(peer)
	if s.subject == nil {
		return nil
	}
	for _, p := range []*policycache.Pod{s.subject, s.peer} {
		if p == nil {
			continue
		}
		s.few.Pods[p.Key()] = p
		if n := c.objects.Namespaces[p.Namespace]; n != nil {
			s.few.Namespaces[n.Name] = n
		}
	}
	return s
}

func (c *Cluster) podAt(a netip.Addr) *policycache.Pod {
	if e := c.snap.Endpoint(a); e != nil {
		return c.objects.Pods[e.Key()]
	}
	return nil
}

// admits tells whether the policy alone would admit the connection. The compiler is
// asked, so that nothing of what a policy means is said a second time here.
func (s *search) admits(p *networkingv1.NetworkPolicy) bool {
	o := *s.few
	o.Policies = map[string]*networkingv1.NetworkPolicy{p.Namespace + "/" + p.Name: p}
	d := policycache.NewCompiler("", slog.New(slog.DiscardHandler)).Compile(&o).Decide(&s.flow)
	side := &d.Ingress
	if s.direction == "egress" {
		side = &d.Egress
	}
	return side.Isolated && side.Verdict == verdict.Allow
}

// rule is a rule of either direction.
type rule struct {
	peers []networkingv1.NetworkPolicyPeer
	ports []networkingv1.NetworkPolicyPort
}

func (s *search) rules(p *networkingv1.NetworkPolicy) (rules []rule) {
	if s.direction == "egress" {
		for _, r := range p.Spec.Egress {
			rules = append(rules, rule{r.To, r.Ports})
		}
		return rules
	}
	for _, r := range p.Spec.Ingress {
		rules = append(rules, rule{r.From, r.Ports})
	}
	return rules
}

// with gives the policy with other rules in the direction.
func (s *search) with(p *networkingv1.NetworkPolicy, rules ...rule) *networkingv1.NetworkPolicy {
	p = p.DeepCopy()
	p.Spec.Ingress, p.Spec.Egress = ifElse(s.direction == "ingress", nil, p.Spec.Ingress), ifElse(s.direction == "egress", nil, p.Spec.Egress)
	for _, r := range rules {
		if s.direction == "egress" {
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: r.peers, Ports: r.ports})
		} else {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: r.peers, Ports: r.ports})
		}
	}
	return p
}

func ifElse[T any](is bool, then, otherwise T) T {
	if is {
		return then
	}
	return otherwise
}

// miss is a rule that nearly admits the connection.
type miss struct {
	policy      *networkingv1.NetworkPolicy
	index       int
	rule        rule
	peer, ports bool // whether they alone would admit it
}

// find gives the change, nil if there is none.
func (s *search) find(isolating []string) *Change {
	var policies []*networkingv1.NetworkPolicy
	subjects := map[*networkingv1.NetworkPolicy]int{}
	for _, name := range isolating {
		if p := s.cluster.objects.Policies[name]; p != nil {
			policies = append(policies, p)
			subjects[p] = s.subjectsOf(p)
		}
	}
	if len(policies) == 0 {
		return nil
	}
	slices.SortStableFunc(policies, func(a, b *networkingv1.NetworkPolicy) int { return cmp.Compare(subjects[a], subjects[b]) })
	misses := s.misses(policies)
	for i := range misses {
		if change := s.extend(&misses[i]); change != nil {
			return change
		}
	}
	return s.add(policies, misses)
}

// misses lists the rules that lack the peer or the port alone, those that lack the
// peer first.
func (s *search) misses(policies []*networkingv1.NetworkPolicy) (found []miss) {
	for _, p := range policies {
		for i, r := range s.rules(p) {
			m := miss{policy: p, index: i, rule: r}
			m.peer = s.admits(s.with(p, rule{peers: r.peers}))
			m.ports = s.admits(s.with(p, rule{ports: r.ports}))
			if m.peer != m.ports {
				found = append(found, m)
			}
		}
	}
	slices.SortStableFunc(found, func(a, b miss) int { return cmp.Compare(btoi(a.peer), btoi(b.peer)) })
	return found
}

func btoi(b bool) int { return ifElse(b, 1, 0) }

// subjectsOf counts the pods that a policy selects. One whose selector can't be read
// selects at least what was meant: all of its namespace.
func (s *search) subjectsOf(p *networkingv1.NetworkPolicy) (n int) {
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	for _, pod := range s.cluster.objects.Pods {
		if pod.Namespace == p.Namespace && !pod.HostNetwork && (err != nil || selector.Matches(labelSet(pod.Labels))) {
			n++
		}
	}
	return n
}

// extend adds to a rule the one thing that it lacks, if that admits no other port for
// the peer, and no other peer than the rule's own.
func (s *search) extend(m *miss) *Change {
	rules := s.rules(m.policy)
	c := &Change{Direction: s.direction, Why: s.lacks(m), Policy: m.policy.Namespace + "/" + m.policy.Name}
	list := ifElse(s.direction == "egress", "to", "from")
	switch {
	case m.ports && len(m.rule.peers) > 0 && s.onlyPort(m.rule.ports):
		peer := s.peerOf(m.policy.Namespace)
		rules[m.index].peers = append(slices.Clone(m.rule.peers), peer)
		c.Value, c.Note = peer, s.peerNote()
	case m.peer && len(m.rule.peers) > 0 && s.flow.Proto.HasPorts():
		port := s.port()
		rules[m.index].ports = append(slices.Clone(m.rule.ports), port)
		c.Value, list = port, "ports"
		c.Note = "the rule's other peers are admitted there too"
		if len(m.rule.peers) == 1 {
			c.Note = "all whom the rule's peer names are admitted there"
		}
	default:
		return nil
	}
	c.Path = fmt.Sprintf("/spec/%s/%d/%s/-", s.direction, m.index, list)
	c.Changed = s.with(m.policy, rules...)
	if !s.admits(c.Changed) {
		return nil // another mistake in the rule keeps it from admitting anything
	}
	return c
}

// onlyPort tells whether a rule's ports are the one that is asked for, by its number or
// by a name. That they admit it is known.
func (s *search) onlyPort(ports []networkingv1.NetworkPolicyPort) bool {
	return len(ports) > 0 && !slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		switch {
		case p.Port == nil || string(ptr(p.Protocol, corev1.ProtocolTCP)) != s.flow.Proto.String():
			return true
		case p.Port.Type == intstr.String:
			return false
		}
		return p.Port.IntVal != int32(s.flow.DstPort) || p.EndPort != nil && *p.EndPort != p.Port.IntVal
	})
}

func ptr[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

// add gives the change that adds a rule for this peer and this port.
func (s *search) add(policies []*networkingv1.NetworkPolicy, misses []miss) *Change {
	p := policies[0]
	r := rule{peers: []networkingv1.NetworkPolicyPeer{s.peerOf(p.Namespace)}}
	note := s.peerNote()
	if s.flow.Proto.HasPorts() {
		r.ports = []networkingv1.NetworkPolicyPort{s.port()}
	} else {
		note = "only a rule without ports admits " + s.flow.Proto.String() + ": it admits every port too"
	}
	c := &Change{Direction: s.direction, Why: s.noneAdmits(policies), Note: note, Policy: p.Namespace + "/" + p.Name}
	if len(misses) > 0 {
		c.Why = s.lacks(&misses[0])
	}
	if labels := stable(s.subject.Labels); len(labels) > 0 && isEmpty(&p.Spec.PodSelector) {
		c.New, c.Changed = true, s.newPolicy(labels, r)
		c.Policy, c.Value = c.Changed.Namespace+"/"+c.Changed.Name, c.Changed
	} else {
		rules := append(s.rules(p), r)
		c.Changed = s.with(p, rules...)
		c.Path, c.Value = fmt.Sprintf("/spec/%s/-", s.direction), s.ruleOf(c.Changed, len(rules)-1)
		if len(rules) == 1 {
			c.Path, c.Value = "/spec/"+s.direction, []any{c.Value}
		}
	}
	if !s.admits(c.Changed) {
		return nil
	}
	return c
}

func (s *search) ruleOf(p *networkingv1.NetworkPolicy, i int) any {
	if s.direction == "egress" {
		return p.Spec.Egress[i]
	}
	return p.Spec.Ingress[i]
}

func isEmpty(s *metav1.LabelSelector) bool { return len(s.MatchLabels)+len(s.MatchExpressions) == 0 }

// newPolicy is a policy for pods that have the labels. They are isolated already, as all
// of their namespace are, so that it only admits.
func (s *search) newPolicy(labels map[string]string, r rule) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.subject.Namespace},
	}
	p.Spec.PodSelector.MatchLabels = labels
	p.Spec.PolicyTypes = []networkingv1.PolicyType{ifElse(s.direction == "egress", networkingv1.PolicyTypeEgress, networkingv1.PolicyTypeIngress)}
	base := ifElse(s.direction == "egress", "allow-from-", "allow-to-") + s.subject.Name
	p.Name = base[:min(len(base), 240)] // of 253, with room for a number
	for n := 2; s.cluster.objects.Policies[p.Namespace+"/"+p.Name] != nil; n++ {
		p.Name = fmt.Sprintf("%s-%d", base[:min(len(base), 240)], n)
	}
	return s.with(p, r)
}

// stable leaves out the labels that say nothing of what a pod is.
func stable(labels map[string]string) map[string]string {
	kept := maps.Clone(labels)
	maps.DeleteFunc(kept, func(key, _ string) bool { return slices.Contains(policycache.OwnLabels, key) })
	return kept
}

// peerOf is the other end as a peer of a policy in a namespace.
func (s *search) peerOf(namespace string) networkingv1.NetworkPolicyPeer {
	if s.peer == nil {
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: netip.PrefixFrom(s.peerAddr, s.peerAddr.BitLen()).String()}}
	}
	p := networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: stable(s.peer.Labels)}}
	if s.peer.Namespace != namespace {
		p.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: s.peer.Namespace}}
	}
	return p
}

// peerNote says whom the peer names besides the other end.
func (s *search) peerNote() string {
	switch {
	case s.peer != nil && len(stable(s.peer.Labels)) == 0:
		return fmt.Sprintf("%s has no labels: this names all pods of namespace %s", s.peer.Key(), s.peer.Namespace)
	case s.peer == nil && s.cluster.snap.Node(s.peerAddr) != "":
		return fmt.Sprintf("all that runs on node %s in its own network has this address", s.cluster.snap.Node(s.peerAddr))
	}
	return ""
}

func (s *search) port() networkingv1.NetworkPolicyPort {
	proto, number := corev1.Protocol(s.flow.Proto.String()), intstr.FromInt32(int32(s.flow.DstPort))
	return networkingv1.NetworkPolicyPort{Protocol: &proto, Port: &number}
}
