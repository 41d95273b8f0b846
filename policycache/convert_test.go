package policycache

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func podWithIPs(podIP string, podIPs ...string) *corev1.Pod {
	p := &corev1.Pod{}
	p.Status.PodIP = podIP
	for _, ip := range podIPs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

func TestPodFromAddresses(t *testing.T) {
	for _, c := range []struct {
		podIP  string
		podIPs string
		want   string
	}{
		{"", "", "[]"},
		{"10.0.0.1", "", "[10.0.0.1]"},
		{"", "10.0.0.1 fd00::1", "[10.0.0.1 fd00::1]"},
		{"10.0.0.1", "10.0.0.1 fd00::1", "[10.0.0.1 fd00::1]"},
		{"fd00::1", "10.0.0.1 fd00::1", "[fd00::1 10.0.0.1]"},
		{"::ffff:10.0.0.1", "10.0.0.1", "[10.0.0.1]"},
		{"FD00:0::1", "fd00::1", "[fd00::1]"},
		{"bad", "10.0.0.1 10.0.0.256 010.0.0.1", "[10.0.0.1]"},
		{"fe80::1%eth0", "", "[]"},
	} {
		got := PodFrom(podWithIPs(c.podIP, strings.Fields(c.podIPs)...))
		if s := fmt.Sprint(got.IPs); s != c.want {
			t.Errorf("podIP %q, podIPs %q: IPs %s, want %s", c.podIP, c.podIPs, s, c.want)
		}
	}
}

func TestPodFromFields(t *testing.T) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	p := podWithIPs("10.0.0.1")
	p.ObjectMeta = metav1.ObjectMeta{Name: "db", UID: types.UID("u1"), Labels: map[string]string{"role": "db"}, CreationTimestamp: metav1.NewTime(created)}
	p.Spec.NodeName, p.Spec.HostNetwork = "n1", true
	p.Status.Phase = corev1.PodRunning
	p.Status.HostIP = "192.168.0.1"
	p.Status.HostIPs = []corev1.HostIP{{IP: "192.168.0.1"}, {IP: "fd01::1"}, {IP: "nonsense"}}
	got := PodFrom(p)
	want := &Pod{
		Namespace: "default", Name: "db", UID: "u1", Labels: map[string]string{"role": "db"},
		IPs: parseAddrs([]string{"10.0.0.1"}), Node: "n1", HostNetwork: true,
		HostIPs: parseAddrs([]string{"192.168.0.1", "fd01::1"}), Phase: "Running", Created: created,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	p.Namespace = "shop"
	if k := PodFrom(p).Key(); k != "shop/db" {
		t.Errorf("key %q, want shop/db", k)
	}
}

func namedPort(name string, number int32, proto corev1.Protocol) corev1.ContainerPort {
	return corev1.ContainerPort{Name: name, ContainerPort: number, Protocol: proto}
}

func podContainer(restart string, ports ...corev1.ContainerPort) corev1.Container {
	c := corev1.Container{Ports: ports}
	if restart != "" {
		policy := corev1.ContainerRestartPolicy(restart)
		c.RestartPolicy = &policy
	}
	return c
}

func TestPodFromNamedPorts(t *testing.T) {
	type list = []corev1.Container
	for _, c := range []struct {
		rule       string
		init, main list
		want       string
	}{
		{"protocol defaults to TCP", nil, list{podContainer("", namedPort("web", 80, ""))}, "[{TCP 80 web}]"},
		{"one name, two protocols", nil, list{podContainer("", namedPort("dns", 53, "UDP"), namedPort("dns", 53, "TCP"))}, "[{UDP 53 dns} {TCP 53 dns}]"},
		{"SCTP", nil, list{podContainer("", namedPort("sig", 36412, "SCTP"))}, "[{SCTP 36412 sig}]"},
		{"ports without a name don't count", nil, list{podContainer("", namedPort("", 80, ""))}, "[]"},
		{"impossible ports are dropped", nil, list{podContainer("", namedPort("a", 0, ""), namedPort("b", 65536, ""), namedPort("c", -1, ""), namedPort("d", 65535, ""))}, "[{TCP 65535 d}]"},
		{"an unknown protocol is dropped", nil, list{podContainer("", namedPort("a", 1, "tcp"))}, "[]"},
		{"a plain init container is gone", list{podContainer("", namedPort("init", 1, ""))}, nil, "[]"},
		{"an init container that isn't Always", list{podContainer("Never", namedPort("init", 1, ""))}, nil, "[]"},
		{"a sidecar counts, after containers", list{podContainer("Always", namedPort("side", 2, ""))}, list{podContainer("", namedPort("web", 1, ""))}, "[{TCP 1 web} {TCP 2 side}]"},
	} {
		p := &corev1.Pod{Spec: corev1.PodSpec{InitContainers: c.init, Containers: c.main}}
		if got := fmt.Sprint(PodFrom(p).Ports); got != c.want {
			t.Errorf("%s: %s, want %s", c.rule, got, c.want)
		}
	}
}

func TestNamespaceFrom(t *testing.T) {
	forged := map[string]string{"kubernetes.io/metadata.name": "kube-system", "project": "x"}
	got := NamespaceFrom(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: forged}})
	want := &Namespace{Name: "shop", Labels: map[string]string{"kubernetes.io/metadata.name": "shop", "project": "x"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("forged label: got %+v, want %+v", got, want)
	}
	if forged["kubernetes.io/metadata.name"] != "kube-system" {
		t.Error("the source object was changed")
	}
	bare := NamespaceFrom(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "bare"}})
	if bare.Labels["kubernetes.io/metadata.name"] != "bare" || len(bare.Labels) != 1 {
		t.Errorf("without labels: got %+v", bare)
	}
}

func TestNodeFrom(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Annotations: map[string]string{ModeAnnotation: "audit-only"}}}
	for _, a := range []string{"n1.example.org", "192.168.0.1", "::ffff:192.168.0.1", "fd01::1", "203.0.113.9"} {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Address: a})
	}
	if got := fmt.Sprint(*NodeFrom(n)); got != "{n1 [192.168.0.1 fd01::1 203.0.113.9] audit-only []}" {
		t.Errorf("got %s", got)
	}
	for _, c := range []struct{ one, all, want string }{
		{"10.244.1.0/24", "10.244.1.0/24 fd00:244:1::/64", "[10.244.1.0/24 fd00:244:1::/64]"},
		{"10.244.1.0/24", "", "[10.244.1.0/24]"},
		{"", "10.244.1.7/24 nonsense ::ffff:10.0.0.0/104", "[10.244.1.0/24]"},
	} {
		n.Spec = corev1.NodeSpec{PodCIDR: c.one, PodCIDRs: strings.Fields(c.all)}
		if got := fmt.Sprint(NodeFrom(n).PodCIDRs); got != c.want {
			t.Errorf("%+v: pod CIDRs %s", c, got)
		}
	}
}

func TestDefaultPolicyTypes(t *testing.T) {
	type types = []networkingv1.PolicyType
	type egress = []networkingv1.NetworkPolicyEgressRule
	for _, c := range []struct {
		given  types
		egress egress
		want   string
	}{
		{nil, nil, "[Ingress]"},
		{nil, egress{}, "[Ingress]"},
		{nil, egress{{}}, "[Ingress Egress]"},
		{types{}, egress{{}}, "[Ingress Egress]"},
		{types{"Egress"}, nil, "[Egress]"},
		{types{"Ingress"}, egress{{}}, "[Ingress]"},
		{types{"Sideways"}, nil, "[Sideways]"},
	} {
		p := &networkingv1.NetworkPolicy{Spec: networkingv1.NetworkPolicySpec{PolicyTypes: c.given, Egress: c.egress}}
		DefaultPolicy(p)
		if got := fmt.Sprint(p.Spec.PolicyTypes); got != c.want {
			t.Errorf("policyTypes %v, egress %v: %s, want %s", c.given, c.egress, got, c.want)
		}
	}
}

func TestDefaultPolicyPortsAndNamespace(t *testing.T) {
	udp, empty := corev1.ProtocolUDP, corev1.Protocol("")
	ports := func() []networkingv1.NetworkPolicyPort {
		return []networkingv1.NetworkPolicyPort{{}, {Protocol: &udp}, {Protocol: &empty}}
	}
	p := &networkingv1.NetworkPolicy{Spec: networkingv1.NetworkPolicySpec{
		Ingress: []networkingv1.NetworkPolicyIngressRule{{Ports: ports()}},
		Egress:  []networkingv1.NetworkPolicyEgressRule{{Ports: ports()}},
	}}
	DefaultPolicy(p)
	for _, got := range [][]networkingv1.NetworkPolicyPort{p.Spec.Ingress[0].Ports, p.Spec.Egress[0].Ports} {
		if *got[0].Protocol != "TCP" || *got[1].Protocol != "UDP" || *got[2].Protocol != "" {
			t.Errorf("protocols %v %v %v, want TCP UDP and the wrong one untouched", *got[0].Protocol, *got[1].Protocol, *got[2].Protocol)
		}
	}
	if p.Namespace != "default" {
		t.Errorf("namespace %q, want default", p.Namespace)
	}
	p.Namespace = "shop"
	if DefaultPolicy(p); p.Namespace != "shop" {
		t.Errorf("namespace %q, want shop", p.Namespace)
	}
}
