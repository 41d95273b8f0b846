package policycache_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"portcullis/policycache"
	"portcullis/verdict"
)

// The oracle in this file reads the networking.k8s.io/v1 text aloud. It walks
// every object for every flow, compiles nothing and shares nothing, so that
// each function can be held against the one sentence of the API that it
// implements. The compiled engine is compared with it.

const (
	ingress = networkingv1.PolicyTypeIngress
	egress  = networkingv1.PolicyTypeEgress
)

// answer is a decision in a form that == compares.
type answer struct {
	Verdict         verdict.Verdict
	Reason          verdict.Reason
	Src, Dst        string // namespace/name, empty where the address is no pod's
	Egress, Ingress answerSide
}

type answerSide struct {
	Judged, Isolated bool
	Verdict          verdict.Verdict
	Policies         string // joined by a comma
	AllowedBy        verdict.RuleRef
}

// String writes an answer the way scenarios expect it: an allow by rules with
// the rule of each isolated end, a deny by rules with the isolating policies of
// each end that turns the flow away, everything else with its reason.
func (a answer) String() string {
	s := a.Verdict.String()
	if a.Reason != verdict.ReasonRule && a.Reason != verdict.ReasonNoRule {
		return s + " " + a.Reason.String()
	}
	for _, d := range []struct {
		word string
		side answerSide
	}{{"egress", a.Egress}, {"ingress", a.Ingress}} {
		switch {
		case !d.side.Isolated || d.side.Verdict != a.Verdict:
		case a.Verdict == verdict.Allow:
			s += fmt.Sprintf(" %s %s#%d", d.word, d.side.AllowedBy.Policy, d.side.AllowedBy.Rule)
		default:
			s += fmt.Sprintf(" %s %s", d.word, d.side.Policies)
		}
	}
	return s
}

// answerOf turns an engine's decision into an answer.
func answerOf(d *verdict.Decision) answer {
	key := func(e *verdict.Endpoint) string {
		if e == nil {
			return ""
		}
		return e.Key()
	}
	side := func(s verdict.Side) answerSide {
		return answerSide{s.Judged, s.Isolated, s.Verdict, strings.Join(s.Policies(), ","), s.AllowedBy()}
	}
	return answer{d.Verdict, d.Reason, key(d.Src), key(d.Dst), side(d.Egress), side(d.Ingress)}
}

// oracle decides one flow for the engine of one node; node "" judges every pod.
func oracle(o *policycache.Objects, node string, f verdict.Flow) answer {
	src, dst := oracleOwner(o, f.Src), oracleOwner(o, f.Dst)
	a := answer{
		Egress:  oracleSide(o, node, egress, src, src, dst, f),
		Ingress: oracleSide(o, node, ingress, dst, src, dst, f),
	}
	if src != nil {
		a.Src = src.Key()
	}
	if dst != nil {
		a.Dst = dst.Key()
	}
	unreadable := f.Defect != verdict.ReasonNone && !f.Src.IsValid() && !f.Dst.IsValid()
	isolated := a.Egress.Isolated || a.Ingress.Isolated
	switch exempt := oracleExemption(o, src, dst, f); {
	case unreadable:
		a.Verdict, a.Reason = oracleDenial(oracleNodeMode(o, node) == "audit-only"), f.Defect
	case exempt != verdict.ReasonNone:
		a.Verdict, a.Reason = verdict.Allow, exempt
		a.Egress.Verdict, a.Egress.AllowedBy = verdict.Allow, verdict.RuleRef{}
		a.Ingress.Verdict, a.Ingress.AllowedBy = verdict.Allow, verdict.RuleRef{}
	case !isolated:
		a.Verdict, a.Reason = verdict.Allow, verdict.ReasonNotIsolated
	case f.Defect != verdict.ReasonNone:
		a.Verdict, a.Reason = oracleDenial(a.Egress.Verdict != verdict.Deny && a.Ingress.Verdict != verdict.Deny), f.Defect
	case a.Egress.Verdict == verdict.Allow && a.Ingress.Verdict == verdict.Allow:
		a.Verdict, a.Reason = verdict.Allow, verdict.ReasonRule
	default:
		a.Verdict, a.Reason = oracleDenial(a.Egress.Verdict != verdict.Deny && a.Ingress.Verdict != verdict.Deny), verdict.ReasonNoRule
	}
	return a
}

// oracleExemption names the reason why policy has no say in a flow: neighbour
// discovery is never blocked, a pod always reaches itself, and a node and its
// own pods always reach each other.
func oracleExemption(o *policycache.Objects, src, dst *policycache.Pod, f verdict.Flow) verdict.Reason {
	v6 := f.Src.Is6() && f.Dst.Is6()
	switch {
	case v6 && f.Proto == verdict.ICMPv6 && f.ICMPType >= 133 && f.ICMPType <= 137:
		return verdict.ReasonNeighbour
	case src != nil && src == dst:
		return verdict.ReasonSelf
	case src == nil && dst != nil && oracleNodeHas(o, dst.Node, f.Src):
		return verdict.ReasonOwnNode
	case dst == nil && src != nil && oracleNodeHas(o, src.Node, f.Dst):
		return verdict.ReasonOwnNode
	}
	return verdict.ReasonNone
}

// oracleNodeHas tells whether an address is one of the named node's: the Node
// says so, or a pod's status says that its host is there, or a hostNetwork pod
// of that node has it. A finished pod's status is stale and says nothing.
func oracleNodeHas(o *policycache.Objects, node string, a netip.Addr) bool {
	if node == "" {
		return false
	}
	if n := o.Nodes[node]; n != nil && slices.Contains(n.Addrs, a) {
		return true
	}
	for _, p := range o.Pods {
		if p.Node != node || !oracleLive(p) {
			continue
		}
		if slices.Contains(p.HostIPs, a) || (p.HostNetwork && slices.Contains(p.IPs, a)) {
			return true
		}
	}
	return false
}

// oracleOwner finds the pod that an address means: live, not on its host's
// network; of several the Running one, then the newest, then the last by name.
func oracleOwner(o *policycache.Objects, a netip.Addr) *policycache.Pod {
	var best *policycache.Pod
	for _, p := range o.Pods {
		if oracleOwnsAddrs(p) && slices.Contains(p.IPs, a) && (best == nil || oracleBeats(p, best)) {
			best = p
		}
	}
	return best
}

func oracleOwnsAddrs(p *policycache.Pod) bool { return !p.HostNetwork && oracleLive(p) }

func oracleLive(p *policycache.Pod) bool {
	return p.Phase != string(corev1.PodSucceeded) && p.Phase != string(corev1.PodFailed)
}

func oracleBeats(p, q *policycache.Pod) bool {
	pr, qr := p.Phase == string(corev1.PodRunning), q.Phase == string(corev1.PodRunning)
	switch {
	case pr != qr:
		return pr
	case !p.Created.Equal(q.Created):
		return p.Created.After(q.Created)
	}
	return p.Key() > q.Key()
}

// oracleSide judges one end of a flow. "Traffic is allowed to a pod if there
// are no NetworkPolicies selecting the pod, OR if the traffic matches at least
// one ingress rule across all of the NetworkPolicy objects whose podSelector
// matches the pod." The same for egress.
func oracleSide(o *policycache.Objects, node string, dir networkingv1.PolicyType, pod, src, dst *policycache.Pod, f verdict.Flow) answerSide {
	s := answerSide{Verdict: verdict.Allow}
	if pod == nil || (node != "" && pod.Node != node) {
		return s
	}
	s.Judged = true
	keys := oracleIsolating(o, dir, pod)
	if len(keys) == 0 {
		return s
	}
	denial := oracleDenial(oracleAuditOnly(o, pod))
	s.Isolated, s.Verdict, s.Policies = true, denial, strings.Join(keys, ",")
	if f.Defect != verdict.ReasonNone {
		return s
	}
	for _, key := range keys {
		for i, r := range oracleRules(o.Policies[key], dir) {
			if s.Verdict == denial && oracleRuleAllows(o, o.Policies[key].Namespace, dir, r, src, dst, f) {
				s.Verdict, s.AllowedBy = verdict.Allow, verdict.RuleRef{Policy: key, Rule: i}
			}
		}
	}
	return s
}

func oracleDenial(auditOnly bool) verdict.Verdict {
	if auditOnly {
		return verdict.WouldDeny
	}
	return verdict.Deny
}

// oracleAuditOnly: what a pod's namespace says of its mode counts, or else what its
// node says.
func oracleAuditOnly(o *policycache.Objects, p *policycache.Pod) bool {
	if ns := o.Namespaces[p.Namespace]; ns != nil && ns.Mode != "" {
		return ns.Mode == "audit-only"
	}
	return oracleNodeMode(o, p.Node) == "audit-only"
}

func oracleNodeMode(o *policycache.Objects, node string) string {
	if n := o.Nodes[node]; n != nil {
		return n.Mode
	}
	return ""
}

// oracleIsolating lists the policies, sorted, that isolate a pod in a
// direction: those of its namespace that select it and have that type.
func oracleIsolating(o *policycache.Objects, dir networkingv1.PolicyType, pod *policycache.Pod) []string {
	var keys []string
	for key, p := range o.Policies {
		if p.Namespace == pod.Namespace && oracleHasType(p, dir) && oracleSubject(&p.Spec.PodSelector, pod.Labels) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// oracleHasType reads policyTypes: "If this field is not specified, policies
// that contain an egress section are assumed to affect egress, and all policies
// are assumed to affect ingress." A word that the API doesn't know might have
// meant either direction, so it counts as both.
func oracleHasType(p *networkingv1.NetworkPolicy, dir networkingv1.PolicyType) bool {
	types := p.Spec.PolicyTypes
	if len(types) == 0 {
		return dir == ingress || len(p.Spec.Egress) > 0
	}
	for _, t := range types {
		if t == dir || (t != ingress && t != egress) {
			return true
		}
	}
	return false
}

// oracleSubject tells whether spec.podSelector selects a pod. A requirement
// that can't be understood can't narrow the selection.
func oracleSubject(s *metav1.LabelSelector, podLabels map[string]string) bool {
	for _, one := range oracleRequirements(s) {
		sel, err := metav1.LabelSelectorAsSelector(one)
		if err == nil && !sel.Matches(labels.Set(podLabels)) {
			return false
		}
	}
	return true
}

// oracleRequirements takes a selector apart into selectors of one requirement.
func oracleRequirements(s *metav1.LabelSelector) []*metav1.LabelSelector {
	var all []*metav1.LabelSelector
	for k, v := range s.MatchLabels {
		all = append(all, &metav1.LabelSelector{MatchLabels: map[string]string{k: v}})
	}
	for _, e := range s.MatchExpressions {
		all = append(all, &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{e}})
	}
	return all
}

// oracleRule is an ingress or an egress rule; they differ in a field's name.
type oracleRule struct {
	ports []networkingv1.NetworkPolicyPort
	peers []networkingv1.NetworkPolicyPeer
}

func oracleRules(p *networkingv1.NetworkPolicy, dir networkingv1.PolicyType) []oracleRule {
	var rules []oracleRule
	if dir == ingress {
		for _, r := range p.Spec.Ingress {
			rules = append(rules, oracleRule{r.Ports, r.From})
		}
		return rules
	}
	for _, r := range p.Spec.Egress {
		rules = append(rules, oracleRule{r.Ports, r.To})
	}
	return rules
}

// oracleRuleAllows: "The traffic must match both ports and from." A list that
// is empty or missing matches everything; one thing wrong in a rule, and the
// rule allows nothing.
func oracleRuleAllows(o *policycache.Objects, ns string, dir networkingv1.PolicyType, r oracleRule, src, dst *policycache.Pod, f verdict.Flow) bool {
	if oracleRuleError(r) != nil {
		return false
	}
	peer, addr := src, f.Src
	if dir == egress {
		peer, addr = dst, f.Dst
	}
	portOK, peerOK := len(r.ports) == 0, len(r.peers) == 0
	for _, p := range r.ports {
		portOK = portOK || oraclePortMatches(p, dst, f)
	}
	for _, p := range r.peers {
		peerOK = peerOK || oraclePeerMatches(o, ns, p, peer, addr)
	}
	return portOK && peerOK
}

func oracleRuleError(r oracleRule) error {
	for _, p := range r.ports {
		if err := oraclePortError(p); err != nil {
			return err
		}
	}
	for _, p := range r.peers {
		if err := oraclePeerError(p); err != nil {
			return err
		}
	}
	return nil
}

// oraclePortError says what the API server would object to in a port.
func oraclePortError(p networkingv1.NetworkPolicyPort) error {
	switch {
	case p.Protocol != nil && !slices.Contains([]corev1.Protocol{"TCP", "UDP", "SCTP"}, *p.Protocol):
		return fmt.Errorf("protocol %q", *p.Protocol)
	case p.Port == nil && p.EndPort != nil:
		return fmt.Errorf("endPort without port")
	case p.Port == nil:
		return nil
	case p.Port.Type == intstr.String && p.EndPort != nil:
		return fmt.Errorf("endPort with a named port")
	case p.Port.Type == intstr.String && len(validation.IsValidPortName(p.Port.StrVal)) > 0:
		return fmt.Errorf("port name %q", p.Port.StrVal)
	case p.Port.Type == intstr.String:
		return nil
	case p.Port.IntVal < 1 || p.Port.IntVal > 65535:
		return fmt.Errorf("port %d", p.Port.IntVal)
	case p.EndPort != nil && (*p.EndPort < p.Port.IntVal || *p.EndPort > 65535):
		return fmt.Errorf("endPort %d", *p.EndPort)
	}
	return nil
}

// oraclePeerError says what the API server would object to in a peer.
func oraclePeerError(p networkingv1.NetworkPolicyPeer) error {
	if p.IPBlock != nil {
		if p.PodSelector != nil || p.NamespaceSelector != nil {
			return fmt.Errorf("ipBlock beside a selector")
		}
		return oracleBlockError(p.IPBlock)
	}
	if p.PodSelector == nil && p.NamespaceSelector == nil {
		return fmt.Errorf("a peer that says nothing")
	}
	for _, s := range []*metav1.LabelSelector{p.PodSelector, p.NamespaceSelector} {
		if _, err := metav1.LabelSelectorAsSelector(s); err != nil {
			return err
		}
	}
	return nil
}

func oracleBlockError(b *networkingv1.IPBlock) error {
	cidr, err := oracleCIDR(b.CIDR)
	if err != nil {
		return err
	}
	for _, e := range b.Except {
		except, err := oracleCIDR(e)
		if err != nil {
			return err
		}
		if except.Bits() <= cidr.Bits() || !cidr.Contains(except.Addr()) {
			return fmt.Errorf("except %v is not inside %v", except, cidr)
		}
	}
	return nil
}

// oracleCIDR reads a CIDR, without its host bits; one that lies among the
// 4-in-6 addresses is the IPv4 prefix that it means.
func oracleCIDR(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, err
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// oraclePortMatches: "If present, only traffic on the specified protocol AND
// port will be matched." A name means the destination pod's ports of that name
// and protocol.
func oraclePortMatches(p networkingv1.NetworkPolicyPort, dst *policycache.Pod, f verdict.Flow) bool {
	proto := corev1.ProtocolTCP
	if p.Protocol != nil {
		proto = *p.Protocol
	}
	want := map[corev1.Protocol]verdict.Protocol{"TCP": 6, "UDP": 17, "SCTP": 132}[proto]
	if f.Proto != want {
		return false
	}
	switch {
	case p.Port == nil:
		return true
	case p.Port.Type == intstr.String:
		return dst != nil && slices.Contains(dst.Ports, verdict.NamedPort{Proto: f.Proto, Port: f.DstPort, Name: p.Port.StrVal})
	case p.EndPort != nil:
		return int32(f.DstPort) >= p.Port.IntVal && int32(f.DstPort) <= *p.EndPort
	}
	return int32(f.DstPort) == p.Port.IntVal
}

// oraclePeerMatches: an ipBlock matches the address, whoever's it is. Selectors
// match pods: "If namespaceSelector is also set, then the NetworkPolicyPeer as a
// whole selects the pods matching podSelector in the namespaces selected by
// namespaceSelector. Otherwise it selects the pods matching podSelector in the
// policy's own namespace."
func oraclePeerMatches(o *policycache.Objects, ns string, p networkingv1.NetworkPolicyPeer, pod *policycache.Pod, addr netip.Addr) bool {
	if p.IPBlock != nil {
		return oracleBlockContains(p.IPBlock, addr)
	}
	if pod == nil {
		return false
	}
	if p.NamespaceSelector == nil && pod.Namespace != ns {
		return false
	}
	if p.NamespaceSelector != nil && !oracleSelects(p.NamespaceSelector, oracleNamespaceLabels(o, pod.Namespace)) {
		return false
	}
	return p.PodSelector == nil || oracleSelects(p.PodSelector, pod.Labels)
}

func oracleBlockContains(b *networkingv1.IPBlock, addr netip.Addr) bool {
	cidr, err := oracleCIDR(b.CIDR)
	if err != nil || !cidr.Contains(addr) {
		return false
	}
	for _, e := range b.Except {
		if except, err := oracleCIDR(e); err != nil || except.Contains(addr) {
			return false
		}
	}
	return true
}

func oracleSelects(s *metav1.LabelSelector, set map[string]string) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(labels.Set(set))
}

// oracleNamespaceLabels gives the labels of a namespace, of which the API
// server sets kubernetes.io/metadata.name itself.
func oracleNamespaceLabels(o *policycache.Objects, name string) map[string]string {
	all := map[string]string{}
	if ns := o.Namespaces[name]; ns != nil {
		for k, v := range ns.Labels {
			all[k] = v
		}
	}
	all[corev1.LabelMetadataName] = name
	return all
}

// oracleInvalid tells whether the API server would refuse a policy, which the
// compiler has to say about it too.
func oracleInvalid(p *networkingv1.NetworkPolicy) bool {
	if _, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector); err != nil {
		return true
	}
	for _, t := range p.Spec.PolicyTypes {
		if t != ingress && t != egress {
			return true
		}
	}
	for _, dir := range []networkingv1.PolicyType{ingress, egress} {
		for _, r := range oracleRules(p, dir) {
			if oracleRuleError(r) != nil {
				return true
			}
		}
	}
	return false
}

// oracleIsolatedAddrs lists the addresses of the pods that are judged on a node
// and isolated in some direction, sorted.
func oracleIsolatedAddrs(o *policycache.Objects, node string) []netip.Addr {
	seen := map[netip.Addr]bool{}
	for _, p := range o.Pods {
		for _, a := range p.IPs {
			owner := oracleOwner(o, a)
			if owner == nil || (node != "" && owner.Node != node) {
				continue
			}
			if len(oracleIsolating(o, ingress, owner))+len(oracleIsolating(o, egress, owner)) > 0 {
				seen[a] = true
			}
		}
	}
	var all []netip.Addr
	for a := range seen {
		all = append(all, a)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// oracleDoubled tells whether two live pods claim one address.
func oracleDoubled(o *policycache.Objects) bool {
	claims := map[netip.Addr]string{}
	for _, p := range o.Pods {
		if !oracleOwnsAddrs(p) {
			continue
		}
		for _, a := range p.IPs {
			if other, ok := claims[a]; ok && other != p.Key() {
				return true
			}
			claims[a] = p.Key()
		}
	}
	return false
}
