package policycache

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"portcullis/verdict"
)

// PodFrom keeps of a Pod what policy sees of it. An object without a namespace
// is in "default". What the API server would never have stored (an address
// that doesn't parse, a port outside 1-65535) is dropped: it can't match
// anything. The result shares p's labels, so p must not change any more.
func PodFrom(p *corev1.Pod) *Pod {
	return &Pod{
		Namespace:   namespaceOf(&p.ObjectMeta),
		Name:        p.Name,
		UID:         string(p.UID),
		Labels:      p.Labels,
		IPs:         podIPs(&p.Status),
		Node:        p.Spec.NodeName,
		HostNetwork: p.Spec.HostNetwork,
		HostIPs:     hostIPs(&p.Status),
		Phase:       string(p.Status.Phase),
		Created:     p.CreationTimestamp.Time,
		Ports:       namedPorts(&p.Spec),
		Workload:    workload(&p.ObjectMeta),
	}
}

// workload names the pod's controller. A Deployment names its ReplicaSets by its
// own name and the hash that their pods have as a label; a ReplicaSet whose name
// ends otherwise is nobody's that could be named by it.
func workload(m *metav1.ObjectMeta) string {
	owner := metav1.GetControllerOfNoCopy(m)
	if owner == nil {
		return ""
	}
	hash := m.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
	if deployment, ok := strings.CutSuffix(owner.Name, "-"+hash); ok && hash != "" && owner.Kind == "ReplicaSet" {
		return "Deployment/" + deployment
	}
	return owner.Kind + "/" + owner.Name
}

// AuditAnnotation is a Namespace's annotation that says which decisions about its
// pods the decision log is to have: all, denied or none.
const AuditAnnotation = "portcullis.dev/audit"

// ModeAnnotation is an annotation of a Namespace or a Node that says what becomes
// of denials by policies of its pods: enforce or audit-only.
const ModeAnnotation = "portcullis.dev/mode"

// NamespaceFrom keeps of a Namespace what policy sees of it. The API server
// gives every namespace the label kubernetes.io/metadata.name with its name
// and lets nobody give it another value, so that a policy may trust it.
func NamespaceFrom(n *corev1.Namespace) *Namespace {
	labels := maps.Clone(n.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[corev1.LabelMetadataName] = n.Name
	return &Namespace{Name: n.Name, Labels: labels, Audit: n.Annotations[AuditAnnotation], Mode: n.Annotations[ModeAnnotation]}
}

// NodeFrom keeps of a Node its name, its mode, those of its addresses, of whatever
// type, that are IP addresses, and its pods' ranges.
func NodeFrom(n *corev1.Node) *Node {
	texts := make([]string, 0, len(n.Status.Addresses))
	for _, a := range n.Status.Addresses {
		texts = append(texts, a.Address)
	}
	return &Node{Name: n.Name, Addrs: parseAddrs(texts), PodCIDRs: podCIDRs(&n.Spec), Mode: n.Annotations[ModeAnnotation]}
}

// podCIDRs reads the ranges of a node's pods; podCIDR is the first of podCIDRs, and
// alone only in what hasn't passed an API server.
func podCIDRs(spec *corev1.NodeSpec) (ranges []netip.Prefix) {
	texts := spec.PodCIDRs
	if len(texts) == 0 && spec.PodCIDR != "" {
		texts = []string{spec.PodCIDR}
	}
	for _, text := range texts {
		if p, err := netip.ParsePrefix(text); err == nil && !p.Addr().Is4In6() {
			ranges = append(ranges, p.Masked())
		}
	}
	return ranges
}

// DefaultPolicy fills in, in place, what the API server would have filled in:
// the namespace "default"; where policyTypes is absent or empty, Ingress
// always, and Egress when there is at least one egress rule; and the protocol
// TCP for ports that name none. It judges nothing: an invalid policy stays as
// invalid as it was.
func DefaultPolicy(p *networkingv1.NetworkPolicy) {
	p.Namespace = namespaceOf(&p.ObjectMeta)
	if len(p.Spec.PolicyTypes) == 0 {
		p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
		if len(p.Spec.Egress) > 0 {
			p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		}
	}
	for i := range p.Spec.Ingress {
		defaultPorts(p.Spec.Ingress[i].Ports)
	}
	for i := range p.Spec.Egress {
		defaultPorts(p.Spec.Egress[i].Ports)
	}
}

func defaultPorts(ports []networkingv1.NetworkPolicyPort) {
	for i := range ports {
		if ports[i].Protocol == nil {
			tcp := corev1.ProtocolTCP
			ports[i].Protocol = &tcp
		}
	}
}

// namespaceOf is "default" where the manifest names none.
func namespaceOf(m *metav1.ObjectMeta) string {
	if m.Namespace == "" {
		return metav1.NamespaceDefault
	}
	return m.Namespace
}

// podIPs gives podIP, which the API calls the primary one, and then whatever
// podIPs adds to it.
func podIPs(s *corev1.PodStatus) []netip.Addr {
	texts := []string{s.PodIP}
	for _, ip := range s.PodIPs {
		texts = append(texts, ip.IP)
	}
	return parseAddrs(texts)
}

func hostIPs(s *corev1.PodStatus) []netip.Addr {
	texts := []string{s.HostIP}
	for _, ip := range s.HostIPs {
		texts = append(texts, ip.IP)
	}
	return parseAddrs(texts)
}

// parseAddrs gives the addresses among the texts in their order, unmapped and
// each once. An address with a zone is none that a packet could carry.
func parseAddrs(texts []string) []netip.Addr {
	var addrs []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			continue
		}
		if a = a.Unmap(); !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// namedPorts lists the ports that a policy may call by name. Init containers
// have come and gone before the pod serves anybody, except those with
// restartPolicy Always (sidecars), whose ports count like a container's.
func namedPorts(s *corev1.PodSpec) []verdict.NamedPort {
	var named []verdict.NamedPort
	for i := range s.Containers {
		named = appendNamed(named, s.Containers[i].Ports)
	}
	for i := range s.InitContainers {
		c := &s.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			named = appendNamed(named, c.Ports)
		}
	}
	return named
}

func appendNamed(named []verdict.NamedPort, ports []corev1.ContainerPort) []verdict.NamedPort {
	for _, p := range ports {
		proto, ok := protocolOf(p.Protocol)
		if !ok || len(validation.IsValidPortName(p.Name)) > 0 || p.ContainerPort < 1 || p.ContainerPort > 65535 {
			continue
		}
		named = append(named, verdict.NamedPort{Proto: proto, Port: uint16(p.ContainerPort), Name: p.Name})
	}
	return named
}

// protocolOf reads a container port's protocol, which defaults to TCP.
func protocolOf(p corev1.Protocol) (verdict.Protocol, bool) {
	switch p {
	case "", corev1.ProtocolTCP:
		return verdict.TCP, true
	case corev1.ProtocolUDP:
		return verdict.UDP, true
	case corev1.ProtocolSCTP:
		return verdict.SCTP, true
	}
	return 0, false
}
