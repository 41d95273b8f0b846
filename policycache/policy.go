package policycache

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"portcullis/verdict"
)

// policy is a NetworkPolicy, read once and ready to be compiled into tables.
type policy struct {
	id        uint64 // told apart from every other policy and version read
	source    *networkingv1.NetworkPolicy
	namespace string
	name      string // "namespace/name"
	selector  verdict.SelectorID
	// ingress and egress say whether the policy isolates in that direction.
	ingress, egress           bool
	ingressRules, egressRules []verdict.Rule
	shared                    [2]uint64 // the numbers of both lists in ruleLists
	// names are the named ports of its ingress rules.
	names []verdict.PortName
	err   error // all that is wrong with it, nil if nothing
	// peers are the selectors that were added for its rules, right or wrong.
	peers []verdict.PeerSelector
}

// policyReader reads NetworkPolicies and numbers the selectors they name.
type policyReader struct {
	namespaces, pods *matcher
	namespace        string
	peers            []verdict.PeerSelector
	errs             []error
}

// readPolicy reads a policy. It never refuses: a policy with mistakes still
// isolates, at least what was meant, and its wrong rules allow nothing. The
// matchers then hold the selectors until dropPolicy.
func (c *Compiler) readPolicy(np *networkingv1.NetworkPolicy) *policy {
	c.nextPolicy++
	r := policyReader{namespaces: c.namespaceLabels, pods: c.podLabels, namespace: namespaceOf(&np.ObjectMeta)}
	p := &policy{id: c.nextPolicy, source: np, namespace: r.namespace, name: policyName(np)}
	selector, err := parseSelector(&np.Spec.PodSelector)
	r.note("spec.podSelector", err)
	p.selector = r.pods.addSelector(selector)
	p.ingress, p.egress = r.directions(&np.Spec)
	ingress, egress := np.Spec.Ingress, np.Spec.Egress
	if err := checkSize(&np.Spec); err != nil {
		r.note("spec", err)
		ingress, egress = nil, nil
	}
	for i, rule := range ingress {
		if rule, ok := r.rule(fmt.Sprintf("spec.ingress[%d]", i), "from", i, rule.From, rule.Ports); ok {
			p.ingressRules = append(p.ingressRules, rule)
		}
	}
	for i, rule := range egress {
		if rule, ok := r.rule(fmt.Sprintf("spec.egress[%d]", i), "to", i, rule.To, rule.Ports); ok {
			p.egressRules = append(p.egressRules, rule)
		}
	}
	for i := range p.ingressRules {
		p.names = append(p.names, p.ingressRules[i].Names...)
	}
	p.ingressRules, p.shared[0] = c.rules.share(p.ingressRules)
	p.egressRules, p.shared[1] = c.rules.share(p.egressRules)
	p.err, p.peers = errors.Join(r.errs...), r.peers
	return p
}

// dropPolicy lets go of the selectors that the policy was read with.
func (c *Compiler) dropPolicy(p *policy) {
	c.rules.drop(p.shared[0])
	c.rules.drop(p.shared[1])
	c.podLabels.dropSelector(p.selector)
	for _, s := range p.peers {
		if s.Namespace != verdict.SameNamespace {
			c.namespaceLabels.dropSelector(s.Namespace)
		}
		c.podLabels.dropSelector(s.Pod)
	}
}

func policyName(np *networkingv1.NetworkPolicy) string {
	return namespaceOf(&np.ObjectMeta) + "/" + np.Name
}

// note keeps an error, if there is one, with the field it is about.
func (r *policyReader) note(field string, err error) {
	if err != nil {
		r.errs = append(r.errs, fmt.Errorf("%s: %s", field, strings.ReplaceAll(err.Error(), "\n", "; ")))
	}
}

// directions reads policyTypes: when absent, a policy always concerns ingress,
// and egress if it has an egress rule. A word that the API doesn't know
// isolates both ways.
func (r *policyReader) directions(spec *networkingv1.NetworkPolicySpec) (ingress, egress bool) {
	if len(spec.PolicyTypes) == 0 {
		return true, len(spec.Egress) > 0
	}
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			ingress = true
		case networkingv1.PolicyTypeEgress:
			egress = true
		default:
			ingress, egress = true, true
			r.note(fmt.Sprintf("spec.policyTypes[%d]", i), fmt.Errorf("%q is neither Ingress nor Egress", t))
		}
	}
	return ingress, egress
}

// rule reads one rule, whose peers the API calls "from" or "to". It reports
// false for a rule with a mistake anywhere in it, which then allows nothing.
func (r *policyReader) rule(field, peersField string, index int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) (verdict.Rule, bool) {
	before := len(r.errs)
	// Absent or empty, the peers are any peer, and the ports any port of any
	// protocol, those without ports included.
	rule := verdict.Rule{Index: index, AnyPeer: len(peers) == 0, AnyPort: len(ports) == 0}
	for i := range peers {
		r.note(fmt.Sprintf("%s.%s[%d]", field, peersField, i), r.peer(&rule, &peers[i]))
	}
	for i := range ports {
		r.note(fmt.Sprintf("%s.ports[%d]", field, i), readPort(&rule, &ports[i]))
	}
	return rule, len(r.errs) == before
}

// peer adds a peer to the rule. A peer is an ipBlock, or else selectors: a
// namespaceSelector alone means all pods of those namespaces, a podSelector
// alone those pods of the policy's own namespace, both together those pods of
// those namespaces.
func (r *policyReader) peer(rule *verdict.Rule, peer *networkingv1.NetworkPolicyPeer) error {
	if peer.IPBlock != nil {
		if peer.PodSelector != nil || peer.NamespaceSelector != nil {
			return errors.New("ipBlock can't stand beside a selector in one peer")
		}
		block, err := readBlock(peer.IPBlock)
		if err != nil {
			return err
		}
		rule.Blocks = append(rule.Blocks, block)
		return nil
	}
	if peer.PodSelector == nil && peer.NamespaceSelector == nil {
		return errors.New("a peer must have a podSelector, a namespaceSelector or an ipBlock")
	}
	namespaces, pods := labels.Everything(), labels.Everything()
	var err error
	if peer.NamespaceSelector != nil {
		if namespaces, err = parseSelector(peer.NamespaceSelector); err != nil {
			return fmt.Errorf("namespaceSelector: %w", err)
		}
	}
	if peer.PodSelector != nil {
		if pods, err = parseSelector(peer.PodSelector); err != nil {
			return fmt.Errorf("podSelector: %w", err)
		}
	}
	s := verdict.PeerSelector{Namespace: verdict.SameNamespace, Pod: r.pods.addSelector(pods)}
	if peer.NamespaceSelector != nil {
		s.Namespace = r.namespaces.addSelector(namespaces)
	}
	r.peers = append(r.peers, s)
	rule.Selectors = append(rule.Selectors, s)
	return nil
}

// readBlock reads an ipBlock. Host bits are masked away; each exception must be
// narrower than the cidr and inside it, as the API server demands.
func readBlock(b *networkingv1.IPBlock) (verdict.Block, error) {
	cidr, err := parsePrefix(b.CIDR)
	if err != nil {
		return verdict.Block{}, fmt.Errorf("ipBlock.cidr: %w", err)
	}
	block := verdict.Block{CIDR: cidr}
	for i, text := range b.Except {
		except, err := parsePrefix(text)
		if err != nil {
			return verdict.Block{}, fmt.Errorf("ipBlock.except[%d]: %w", i, err)
		}
		if except.Bits() <= cidr.Bits() || !cidr.Contains(except.Addr()) {
			return verdict.Block{}, fmt.Errorf("ipBlock.except[%d]: %s is not inside cidr %s", i, text, b.CIDR)
		}
		block.Except = append(block.Except, except)
	}
	return block, nil
}

// parsePrefix reads a CIDR, masks it, and turns an IPv4 prefix written as IPv6
// (::ffff:10.0.0.0/104) into the IPv4 one that it means.
func parsePrefix(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not a CIDR such as 10.0.0.0/8", text)
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// readPort adds a port to the rule: all ports of the protocol when port is
// absent, a range with endPort, a name to be resolved at the destination, or
// one number.
func readPort(rule *verdict.Rule, p *networkingv1.NetworkPolicyPort) error {
	proto, err := readProtocol(p.Protocol)
	if err != nil {
		return err
	}
	switch {
	case p.Port == nil && p.EndPort != nil:
		return errors.New("endPort needs a port")
	case p.Port == nil:
		rule.Ports = append(rule.Ports, verdict.PortRange{Proto: proto, First: 0, Last: 65535})
		return nil
	case p.Port.Type == intstr.String && p.EndPort != nil:
		return fmt.Errorf("endPort can't be used with the named port %q", p.Port.StrVal)
	case p.Port.Type == intstr.String:
		if wrong := validation.IsValidPortName(p.Port.StrVal); len(wrong) > 0 {
			return fmt.Errorf("port name %q: %s", p.Port.StrVal, strings.Join(wrong, ", "))
		}
		rule.Names = append(rule.Names, verdict.PortName{Proto: proto, Name: p.Port.StrVal})
		return nil
	}
	first, last := p.Port.IntVal, p.Port.IntVal
	if p.EndPort != nil {
		last = *p.EndPort
	}
	switch {
	case first < 1 || first > 65535:
		return fmt.Errorf("port %d is not between 1 and 65535", first)
	case last < first:
		return fmt.Errorf("endPort %d is below port %d", last, first)
	case last > 65535:
		return fmt.Errorf("endPort %d is not between 1 and 65535", last)
	}
	rule.Ports = append(rule.Ports, verdict.PortRange{Proto: proto, First: uint16(first), Last: uint16(last)})
	return nil
}

// readProtocol reads a port's protocol, TCP when absent.
func readProtocol(p *corev1.Protocol) (verdict.Protocol, error) {
	if p == nil {
		return verdict.TCP, nil
	}
	switch *p {
	case corev1.ProtocolTCP:
		return verdict.TCP, nil
	case corev1.ProtocolUDP:
		return verdict.UDP, nil
	case corev1.ProtocolSCTP:
		return verdict.SCTP, nil
	}
	return 0, fmt.Errorf("protocol %q is not TCP, UDP or SCTP", *p)
}
