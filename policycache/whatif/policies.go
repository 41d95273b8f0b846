package whatif

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	kyaml "sigs.k8s.io/yaml"
)

// Suggestion is a policy and the evidence for it.
type Suggestion struct {
	Policy *networkingv1.NetworkPolicy
	// Comment and those of the rules, one for each, may have several lines.
	Comment         string
	Ingress, Egress []string
}

// Policies gives a policy for each workload that was judged, in the order of
// their names. It isolates in the directions in which the log judged the
// workload, and admits what was seen allowed there. The policies stand for
// themselves: they are meant in place of those in force, not beside them.
func (g *Suggest) Policies() []Suggestion {
	var all []Suggestion
	taken := map[string]bool{}
	for _, s := range g.sorted() {
		if !g.suggests(s) {
			continue
		}
		name := freeName(taken, s.group)
		p := &networkingv1.NetworkPolicy{
			TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
			ObjectMeta: metav1.ObjectMeta{Namespace: s.group.namespace, Name: name},
		}
		p.Spec.PodSelector = *s.group.selector
		one := Suggestion{Policy: p, Comment: s.comment()}
		if s.ingress.judged {
			p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
			for _, r := range s.ingress.rules() {
				p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: r.apiPeers(), Ports: r.apiPorts()})
				one.Ingress = append(one.Ingress, r.comment())
			}
		}
		if s.egress.judged {
			p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
			for _, r := range s.egress.rules() {
				p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: r.apiPeers(), Ports: r.apiPorts()})
				one.Egress = append(one.Egress, r.comment())
			}
		}
		all = append(all, one)
	}
	return all
}

// freeName gives a policy name that none has in the group's namespace.
func freeName(taken map[string]bool, g *group) string {
	const longest = 240 // of 253, with room for a number
	base := "suggested-" + g.name
	base = strings.TrimRight(base[:min(len(base), longest)], "-.")
	name := base
	for n := 2; taken[g.namespace+"/"+name]; n++ {
		name = fmt.Sprintf("%s-%d", base, n)
	}
	taken[g.namespace+"/"+name] = true
	return name
}

func (s *subject) comment() string {
	const most = 5
	pods := strings.Join(s.group.pods[:min(most, len(s.group.pods))], ", ")
	if n := len(s.group.pods); n > most {
		pods += fmt.Sprintf(" and %d more", n-most)
	}
	text := fmt.Sprintf("%s: pods %s", s.group, pods)
	for _, d := range []struct {
		name string
		e    *evidence
	}{{"ingress", &s.ingress}, {"egress", &s.egress}} {
		if d.e.judged && len(d.e.peers) == 0 {
			text += fmt.Sprintf("\nNo %s that needs a rule was seen allowed: none is admitted.", d.name)
		}
		if d.e.denied > 0 {
			text += fmt.Sprintf("\nDenied, and no evidence: %s, %s.", connections(d.e.denied), d.name)
		}
	}
	return text
}

func (r *rule) comment() string {
	var text []string
	for i := range r.peers {
		text = append(text, r.described(i))
	}
	if len(r.ports) == 0 {
		text = append(text, "A protocol without ports was seen, which only a rule without ports admits: it admits every port too.")
	}
	return strings.Join(text, "\n")
}

func (r *rule) apiPeers() []networkingv1.NetworkPolicyPeer {
	var all []networkingv1.NetworkPolicyPeer
	for _, p := range r.peers {
		if p.group == nil {
			all = append(all, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: p.block.String()}})
			continue
		}
		all = append(all, networkingv1.NetworkPolicyPeer{
			PodSelector:       p.group.selector,
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: p.group.namespace}},
		})
	}
	return all
}

func (r *rule) apiPorts() []networkingv1.NetworkPolicyPort {
	var all []networkingv1.NetworkPolicyPort
	for _, p := range r.ports {
		proto, number := corev1.Protocol(p.proto.String()), intstr.FromInt32(int32(p.number))
		all = append(all, networkingv1.NetworkPolicyPort{Protocol: &proto, Port: &number})
	}
	return all
}

// WriteYAML writes the suggestions as one YAML stream, with the evidence in
// comments.
func WriteYAML(w io.Writer, all []Suggestion) error {
	var b bytes.Buffer
	for i := range all {
		doc, err := all[i].document()
		if err != nil {
			return fmt.Errorf("policy %s/%s: %w", all[i].Policy.Namespace, all[i].Policy.Name, err)
		}
		if i > 0 {
			b.WriteString("---\n")
		}
		b.Write(doc)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// document writes one policy as the API's own YAML, and its comments between.
func (s *Suggestion) document() ([]byte, error) {
	plain, err := kyaml.Marshal(s.Policy)
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(plain, &doc); err != nil {
		return nil, err
	}
	doc.HeadComment = s.Comment
	spec := field(doc.Content[0], "spec")
	for i, comment := range s.Ingress {
		field(spec, "ingress").Content[i].HeadComment = comment
	}
	for i, comment := range s.Egress {
		field(spec, "egress").Content[i].HeadComment = comment
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	enc.CompactSeqIndent()
	err = enc.Encode(&doc)
	return b.Bytes(), err
}

// field gives the value of a mapping's key, an empty node if there is none.
func field(mapping *yaml.Node, key string) *yaml.Node {
	for i := 0; mapping.Kind == yaml.MappingNode && i < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i+1]
		}
	}
	return &yaml.Node{}
}
