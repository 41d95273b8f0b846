package bench

import (
	"fmt"
	"net/netip"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/policycache"
	"portcullis/verdict"
)

// podsPerNamespace is how many pods a generated namespace has.
const podsPerNamespace = 10

// Cluster makes a dual-stack cluster of pods, ten to a namespace, and of
// policies that go around the namespaces. Each namespace has the labels team
// (one of 50) and stage (one of 3), each pod app (one of 10), tier (one of 3)
// and a label of its own, as StatefulSets give. All peer kinds take turns.
func Cluster(pods, policies int) *policycache.Objects {
	o := policycache.NewObjects()
	namespaces := max(1, pods/podsPerNamespace)
	for i := range namespaces {
		name := namespaceName(i)
		o.Namespaces[name] = &policycache.Namespace{Name: name, Labels: map[string]string{
			"team":  fmt.Sprint("team-", i%50),
			"stage": fmt.Sprint("stage-", i%3),
		}}
	}
	for i := range pods {
		p := clusterPod(i, namespaces)
		o.Pods[p.Key()] = p
	}
	for i := range policies {
		np := clusterPolicy(i, namespaces)
		o.Policies[np.Namespace+"/"+np.Name] = np
	}
	return o
}

func namespaceName(i int) string { return fmt.Sprintf("ns-%04d", i) }

func clusterPod(i, namespaces int) *policycache.Pod {
	name := fmt.Sprintf("pod-%05d", i)
	return &policycache.Pod{
		Namespace: namespaceName(i % namespaces),
		Name:      name,
		UID:       fmt.Sprint(i),
		Labels: map[string]string{
			"app":  fmt.Sprint("app-", i/namespaces%10),
			"tier": fmt.Sprint("tier-", i%3),
			"pod":  name,
		},
		IPs:     []netip.Addr{PodIPv4(i), PodIPv6(i)},
		Node:    fmt.Sprint("node-", i%100),
		Phase:   "Running",
		Created: time.Unix(int64(i), 0),
		Ports:   []verdict.NamedPort{{Proto: verdict.TCP, Port: uint16(8000 + i%4), Name: "http"}},
	}
}

// PodIPv4 is the IPv4 address of the generated pod i.
func PodIPv4(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(64 + i>>16), byte(i >> 8), byte(i)})
}

// PodIPv6 is the IPv6 address of the generated pod i.
func PodIPv6(i int) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 0, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)})
}

// clusterPolicy makes the i-th policy. It selects a tenth of the pods of its
// namespace, or all; every rule opens TCP 5432 or something else, so that both
// verdicts occur.
func clusterPolicy(i, namespaces int) *networkingv1.NetworkPolicy {
	round := i / namespaces // the how-manieth of its namespace
	np := &networkingv1.NetworkPolicy{}
	np.Namespace, np.Name = namespaceName(i%namespaces), fmt.Sprintf("policy-%05d", i)
	if round%2 == 1 {
		np.Spec.PodSelector.MatchLabels = map[string]string{"app": fmt.Sprint("app-", round%10)}
	}
	peer, port := clusterPeer(i, round), intstr.FromInt32(int32(5432+round%4))
	if round%7 == 6 {
		port = intstr.FromString("http")
	}
	ports := []networkingv1.NetworkPolicyPort{{Port: &port}}
	np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: peer, Ports: ports}}
	np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: peer, Ports: ports}}
	if round%2 == 0 { // most egress stays inside the cluster, whatever the namespace
		np.Spec.Egress[0].To = []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}}}
	}
	return np
}

// clusterPeer gives each of the API's kinds of peer in turn.
func clusterPeer(i, round int) []networkingv1.NetworkPolicyPeer {
	label := func(key string, value int) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{key: fmt.Sprint(key, "-", value)}}
	}
	switch round % 5 {
	case 0:
		return []networkingv1.NetworkPolicyPeer{{NamespaceSelector: label("team", i%50), PodSelector: label("app", 1)}}
	case 1:
		return []networkingv1.NetworkPolicyPeer{{PodSelector: label("tier", i%3)}}
	case 2:
		return []networkingv1.NetworkPolicyPeer{{NamespaceSelector: label("stage", i%3)}}
	case 3:
		return []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{
			CIDR: fmt.Sprintf("10.%d.0.0/16", i%256), Except: []string{fmt.Sprintf("10.%d.%d.0/24", i%256, i%200)},
		}}, {IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("fd%02x::/16", i%256)}}}
	}
	return []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{
		MatchExpressions: []metav1.LabelSelectorRequirement{
			{Key: "stage", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"stage-0"}},
		},
	}, PodSelector: label("app", i%10)}}
}
