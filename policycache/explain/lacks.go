package explain

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/verdict"
)

func labelSet(set map[string]string) labels.Set { return labels.Set(set) }

// lacks says what a rule that nearly admits the connection lacks.
func (s *search) lacks(m *miss) string {
	name := fmt.Sprintf("%s rule %d of %s/%s", s.direction, m.index, m.policy.Namespace, m.policy.Name)
	if m.ports {
		return fmt.Sprintf("%s admits %s, but not %s: %s", name, s.service(), s.peerName(), s.lacksPeer(m))
	}
	return fmt.Sprintf("%s admits %s, but not %s%s", name, s.peerName(), s.service(), s.lacksName(m))
}

func (s *search) service() string {
	if !s.flow.Proto.HasPorts() {
		return s.flow.Proto.String()
	}
	return fmt.Sprintf("%s %d", s.flow.Proto, s.flow.DstPort)
}

func (s *search) peerName() string {
	if s.peer != nil {
		return s.peer.Key()
	}
	return s.peerAddr.String()
}

// lacksPeer says why none of a rule's peers is the other end.
func (s *search) lacksPeer(m *miss) string {
	for i := range m.rule.peers {
		if b := m.rule.peers[i].IPBlock; b != nil {
			if except := excepted(b, s.peerAddr); except != "" {
				return fmt.Sprintf("its ipBlock %s leaves out %s, which holds %s", b.CIDR, except, s.peerAddr)
			}
		}
	}
	if s.peer == nil {
		return fmt.Sprintf("it has no ipBlock that holds %s", s.peerAddr)
	}
	for i := range m.rule.peers {
		p := m.rule.peers[i].DeepCopy()
		if p.IPBlock != nil {
			continue
		}
		if p.PodSelector = (&metav1.LabelSelector{}); s.admits(s.with(m.policy, rule{peers: []networkingv1.NetworkPolicyPeer{*p}})) {
			return fmt.Sprintf("it has a peer for namespace %s, but no podSelector that matches the labels %s", s.peer.Namespace, labelWords(s.peer.Labels))
		}
	}
	return fmt.Sprintf("it has no peer that names namespace %s", s.peer.Namespace)
}

// excepted gives the exception of a block that holds the address, if the block itself
// does.
func excepted(b *networkingv1.IPBlock, a netip.Addr) string {
	if cidr, err := netip.ParsePrefix(b.CIDR); err != nil || !cidr.Contains(a) {
		return ""
	}
	for _, text := range b.Except {
		if p, err := netip.ParsePrefix(text); err == nil && p.Contains(a) {
			return text
		}
	}
	return ""
}

func labelWords(set map[string]string) string {
	if len(set) == 0 {
		return "of a pod without any"
	}
	words := make([]string, 0, len(set))
	for _, key := range slices.Sorted(maps.Keys(set)) {
		words = append(words, key+"="+set[key])
	}
	return strings.Join(words, ", ")
}

// lacksName says what the rule's named ports, of the connection's protocol, are at the
// destination.
func (s *search) lacksName(m *miss) string {
	to := s.cluster.podAt(s.flow.Dst)
	var words []string
	for _, p := range m.rule.ports {
		if p.Port == nil || p.Port.Type != intstr.String || string(ptr(p.Protocol, "TCP")) != s.flow.Proto.String() {
			continue
		}
		name, proto := p.Port.StrVal, s.flow.Proto
		if to == nil {
			words = append(words, fmt.Sprintf("its port %s can't be looked up, as %s is no pod", name, s.flow.Dst))
			continue
		}
		at := slices.IndexFunc(to.Ports, func(n verdict.NamedPort) bool { return n.Name == name && n.Proto == proto })
		if at < 0 {
			words = append(words, fmt.Sprintf("%s has no %s port named %s", to.Key(), proto, name))
		} else {
			words = append(words, fmt.Sprintf("its port %s is %d of %s", name, to.Ports[at].Port, to.Key()))
		}
	}
	if len(words) == 0 {
		return ""
	}
	return ": " + strings.Join(words, ", ")
}

// noneAdmits says that the policies have no rule that comes near.
func (s *search) noneAdmits(policies []*networkingv1.NetworkPolicy) string {
	var names []string
	rules := 0
	for _, p := range policies {
		names = append(names, p.Namespace+"/"+p.Name)
		rules += len(s.rules(p))
	}
	all := strings.Join(names, ", ")
	if rules == 0 {
		return fmt.Sprintf("%s %s no %s rule at all", all, ifElse(len(names) == 1, "has", "have"), s.direction)
	}
	return fmt.Sprintf("no %s rule of %s admits %s, nor %s", s.direction, all, s.peerName(), s.service())
}
