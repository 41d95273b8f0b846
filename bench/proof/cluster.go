package proof

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/bench"
	"portcullis/bench/lab"
)

// measured is the namespace of the pods that load and serve.
const measured = "measured"

var (
	firstClient = netip.MustParseAddr("10.1.0.1")
	firstServer = netip.MustParseAddr("10.1.1.1")
	firstCaller = netip.MustParseAddr("10.1.2.1")
)

// callers are pods that policies admit and that never call.
const callers = 10

// clusterSpec is the cluster that a variant's policies come from.
type clusterSpec struct {
	// onPod policies select every measured server. Only the last in order admits
	// the clients: TCP to both its ports and UDP. Each other admits one of ten
	// callers to one port.
	onPod int
	// elsewhere policies, of all kinds of peers, select pods that aren't measured;
	// pods is how many of those there are (bench.Cluster).
	elsewhere, pods int
}

// addrs gives n addresses in a row.
func addrs(first netip.Addr, n int) []netip.Addr {
	all := make([]netip.Addr, n)
	for i := range all {
		all[i], first = first, first.Next()
	}
	return all
}

// objects gives the cluster's, but for the measured servers.
func (c clusterSpec) objects(pairs int) (namespaces []*corev1.Namespace, pods []*corev1.Pod, policies []*networkingv1.NetworkPolicy) {
	objects := bench.Cluster(c.pods, c.elsewhere)
	for _, ns := range objects.Namespaces {
		namespaces = append(namespaces, namespaceManifest(ns.Name, ns.Labels))
	}
	namespaces = append(namespaces, namespaceManifest(measured, nil))
	for _, p := range objects.Pods {
		pods = append(pods, podManifest(p.Namespace, p.Name, p.Node, p.Labels, p.IPs...))
	}
	for i, ip := range addrs(firstClient, pairs) {
		pods = append(pods, podManifest(measured, fmt.Sprint("client-", i), lab.NodeName, labels("role", "client"), ip))
	}
	for i, ip := range addrs(firstCaller, callers) {
		pods = append(pods, podManifest(measured, fmt.Sprint("caller-", i), "node-2", labels("role", callerRole(i)), ip))
	}
	for _, np := range objects.Policies {
		policies = append(policies, policyManifest(np))
	}
	for i := range c.onPod {
		policies = append(policies, c.policy(i))
	}
	return namespaces, pods, policies
}

// write puts the cluster's manifests into a directory.
func (c clusterSpec) write(dir string, pairs int) error {
	namespaces, pods, policies := c.objects(pairs)
	for i := range pairs {
		if err := writeManifests(serverFile(dir, i), serverManifest(i, nil)); err != nil {
			return err
		}
	}
	return errors.Join(writeManifests(filepath.Join(dir, "namespaces.json"), namespaces...),
		writeManifests(filepath.Join(dir, "pods.json"), pods...), writeManifests(filepath.Join(dir, "policies.json"), policies...))
}

func callerRole(i int) string           { return fmt.Sprint("caller-", i%callers) }
func labels(k, v string) labelMap       { return labelMap{k: v} }
func serverName(i int) string           { return fmt.Sprint("server-", i) }
func policyName(i int) string           { return fmt.Sprintf("policy-%05d", i) }
func serverFile(d string, i int) string { return filepath.Join(d, serverName(i)+".json") }

type labelMap = map[string]string

// policy makes the i-th policy that selects the servers.
func (c clusterSpec) policy(i int) *networkingv1.NetworkPolicy {
	if i < c.onPod-1 {
		return serverPolicy(policyName(i), labels("role", "server"), callerRole(i), portOf(corev1.ProtocolTCP, connectPort))
	}
	return serverPolicy(policyName(i), labels("role", "server"), "client",
		portOf(corev1.ProtocolTCP, connectPort), portOf(corev1.ProtocolTCP, sinkPort), portOf(corev1.ProtocolUDP, connectPort))
}

// changePolicy admits clients to the port that is shut otherwise.
func changePolicy(name string, selects labelMap) *networkingv1.NetworkPolicy {
	return serverPolicy(name, selects, "client", portOf(corev1.ProtocolUDP, changePort))
}

func portOf(protocol corev1.Protocol, port int32) networkingv1.NetworkPolicyPort {
	number := intstr.FromInt32(port)
	return networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: &number}
}

// serverPolicy admits the pods of a role to ports of the selected ones.
func serverPolicy(name string, selects labelMap, role string, ports ...networkingv1.NetworkPolicyPort) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{}
	np.Namespace, np.Name = measured, name
	np.Spec.PodSelector.MatchLabels = selects
	np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{
		From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: labels("role", role)}}},
		Ports: ports,
	}}
	return policyManifest(np)
}

func policyManifest(np *networkingv1.NetworkPolicy) *networkingv1.NetworkPolicy {
	np.TypeMeta = metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}
	return np
}

func namespaceManifest(name string, labels labelMap) *corev1.Namespace {
	return &corev1.Namespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
	}
}

// serverManifest is the i-th server, with labels besides those that it always has.
func serverManifest(i int, extra labelMap) *corev1.Pod {
	all := labelMap{"role": "server", "pod": serverName(i)}
	for k, v := range extra {
		all[k] = v
	}
	return podManifest(measured, serverName(i), lab.NodeName, all, addrs(firstServer, i+1)[i])
}

func podManifest(namespace, name, node string, labels labelMap, ips ...netip.Addr) *corev1.Pod {
	pod := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "lab"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, ip := range ips {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	if len(ips) > 0 {
		pod.Status.PodIP = ips[0].String()
	}
	return pod
}

// writeManifests puts objects into one file, which appears whole.
func writeManifests[T any](path string, objects ...T) error {
	list := struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Items      []T    `json:"items"`
	}{"v1", "List", objects}
	b, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return lab.WriteFile(path, string(b))
}

func removeManifest(path string) error { return os.Remove(path) }
