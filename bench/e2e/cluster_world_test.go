//go:build cluster || conformance

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"portcullis/bench/lab"
)

// rollout bounds how long a change of a DaemonSet may take.
const rollout = 2 * time.Minute

const repo = "../.."

// cluster is a world whose pods are real: a Kubernetes of two nodes with the agent
// as its DaemonSet. Servers and probes of the lab run in the pods' namespaces.
type cluster struct {
	*world
	kind
}

// kind is what a cluster's nodes are like: the CNI plugin, kube-proxy's mode and
// what the iptables command is.
type kind struct{ cni, proxy, iptables string }

func (k kind) String() string { return k.cni + "-" + k.proxy + "-" + k.iptables }

// newCluster brings a cluster up, which goes away with the test.
func newCluster(t *testing.T, k kind) *cluster {
	t.Helper()
	c := &cluster{&world{T: t, lab: lab.Around()}, k}
	script := func(name string) *exec.Cmd {
		cmd := exec.Command(filepath.Join(repo, "deploy/cluster", name))
		cmd.Env = append(os.Environ(), "NODES=2", "DUAL=1", "CNI="+k.cni, "PROXY="+k.proxy, "IPTABLES="+k.iptables)
		return cmd
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.tellTroubles()
		}
		c.must(c.lab.Close())
		if out, err := script("down.sh").CombinedOutput(); err != nil {
			t.Errorf("down.sh: %v\n%s", err, out)
		}
	})
	if out, err := script("up.sh").CombinedOutput(); err != nil {
		t.Fatalf("up.sh: %v\n%s", err, out)
	}
	return c
}

// cast fills the cluster with somebody for each clause of the example policies: see
// castManifest.
func (c *cluster) cast() {
	c.Helper()
	c.explain = []string{filepath.Join(repo, "deploy/cluster/on"), "0", binary,
		"explain", "--kubeconfig", filepath.Join(repo, ".cluster/pki/admin.kubeconfig")}
	c.applyText(castManifest)
	c.kubectl("wait", "--for=condition=Ready", "pod", "--all", "-A", "--timeout=120s")
	c.adoptPods()
	c.adoptOthers()
}

// tellTroubles prints what helps to understand a failure.
func (c *cluster) tellTroubles() {
	for _, args := range []string{
		"get pods -A -o wide", "get netpol -A", "-n portcullis describe pods",
		"-n portcullis logs -l app.kubernetes.io/name=portcullis --tail=60 --prefix",
	} {
		out, err := exec.Command(filepath.Join(repo, "deploy/cluster/kubectl"), strings.Fields(args)...).CombinedOutput()
		c.Logf("kubectl %s: %v\n%s", args, err, out)
	}
	for node := 1; node <= 2; node++ {
		out, _ := exec.Command(filepath.Join(repo, "deploy/cluster/on"), fmt.Sprint(node), "sh", "-c",
			"iptables-save -t mangle -c; ip6tables-save -t mangle -c; ipset list; cat /proc/thread-self/net/netfilter/nfnetlink_queue").CombinedOutput()
		c.Logf("node %d:\n%s", node, out)
	}
}

// kubectl runs kubectl, whose failure ends the test.
func (c *cluster) kubectl(args ...string) string {
	c.Helper()
	return c.kubectlIn("", args...)
}

func (c *cluster) kubectlIn(stdin string, args ...string) string {
	c.Helper()
	cmd := exec.Command(filepath.Join(repo, "deploy/cluster/kubectl"), args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (c *cluster) applyText(text string) {
	c.Helper()
	c.kubectlIn(text, "apply", "-f", "-")
}

// on runs a shell script in all namespaces of a node; 0 is the control plane.
func (c *cluster) on(node int, script string) string {
	c.Helper()
	out, err := exec.Command(filepath.Join(repo, "deploy/cluster/on"), fmt.Sprint(node), "sh", "-c", script).CombinedOutput()
	if err != nil {
		c.Fatalf("on node %d: %s: %v\n%s", node, script, err, out)
	}
	return string(out)
}

// rolledOut waits until the DaemonSet runs everywhere as it was last applied.
func (c *cluster) rolledOut() {
	c.Helper()
	c.kubectl("-n", "portcullis", "rollout", "status", "daemonset/portcullis", "--timeout", rollout.String())
}

// pods gives the pods of a namespace, or with "" of all.
func (c *cluster) pods(namespace string) []corev1.Pod {
	c.Helper()
	var list corev1.PodList
	c.must(json.Unmarshal([]byte(c.kubectl("get", "pods", "-o", "json", "-n", namespace, fmt.Sprintf("-A=%t", namespace == ""))), &list))
	return list.Items
}

// adoptPods takes the pods with a network of their own into the lab, by
// namespace/name, and starts the servers that the rows are about.
func (c *cluster) adoptPods() {
	c.Helper()
	namespaces := map[netip.Addr]string{}
	for node := 1; node <= 2; node++ {
		root := strings.TrimSpace(c.on(0, fmt.Sprintf("echo /proc/$(pgrep -P $(cat %s/.cluster/pid/pc-n%d))/root", repo, node)))
		for l := range strings.Lines(c.on(node, "for n in /run/netns/*; do ip -n ${n##*/} -4 -br addr show dev eth0 | sed \"s#.* \\([0-9.]*\\)/.*#$n \\1#\"; done")) {
			path, ip, _ := strings.Cut(strings.TrimSpace(l), " ")
			namespaces[netip.MustParseAddr(ip)] = root + path
		}
	}
	for _, p := range c.pods("") {
		if p.Spec.HostNetwork {
			continue
		}
		var ips []netip.Addr
		for _, ip := range p.Status.PodIPs {
			ips = append(ips, addrs(ip.IP)...)
		}
		key := p.Namespace + "/" + p.Name
		path, ok := namespaces[ips[0]]
		if !ok {
			c.Fatalf("no network namespace has the address of %s, %s: %v", key, ips[0], namespaces)
		}
		c.must(c.lab.Adopt(key, path, ips...))
		c.must(c.lab.Serve(key, served...))
	}
}

// adoptOthers takes the nodes in, and hosts outside the cluster with the addresses
// that the example policies speak of.
func (c *cluster) adoptOthers() {
	c.Helper()
	c.must(c.lab.Adopt(lab.Node, "/run/netns/pc-n1", addrs("172.30.99.11", "fd00:172::11")...))
	c.must(c.lab.Adopt("node2", "/run/netns/pc-n2", addrs("172.30.99.12", "fd00:172::12")...))
	c.must(c.lab.Serve(lab.Node, lab.Port{Proto: lab.TCP, Port: 9999}))
	for i, h := range []struct{ name, ip4, ip6 string }{
		{"docker", "172.17.0.5", "fd00:17::5"}, {"docker1", "172.17.1.5", "fd00:17:1::5"},
		{"ten", "10.0.0.9", "fd00:a::9"}, {"ten1", "10.0.1.9", "fd00:a:1::9"},
	} {
		name := "pc-" + h.name
		c.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
		c.must(run1("sh", "-ec", fmt.Sprintf(`ip netns add %[1]s
			ip -n pc-net link add h%[2]d type veth peer name eth0 netns %[1]s
			ip -n pc-net link set h%[2]d master br0 up
			ip -n %[1]s link set lo up; ip -n %[1]s link set eth0 up
			ip -n %[1]s addr add %[3]s dev eth0; ip -n %[1]s addr add %[4]s dev eth0 nodad
			for i in 1 2; do
				ip -n %[1]s route add 172.30.99.1$i dev eth0; ip -n %[1]s route add fd00:172::1$i dev eth0
				ip -n %[1]s route add 10.244.$i.0/24 via 172.30.99.1$i; ip -n %[1]s route add fd00:244:$i::/64 via fd00:172::1$i
				ip -n pc-n$i route add %[3]s dev eth0; ip -n pc-n$i route add %[4]s dev eth0
			done`, name, i, h.ip4, h.ip6)))
		c.must(c.lab.Adopt(h.name, "/run/netns/"+name, addrs(h.ip4, h.ip6)...))
		c.must(c.lab.Serve(h.name, served...))
	}
}

func run1(argv ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", argv, err, out)
	}
	return nil
}

// castManifest has somebody for each clause of the example policies, on both nodes,
// each asked by kubelet every second whether it is alive and ready; a pod on the
// node's network with a label that selectors look for; and Services of the database.
var castManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: mine, labels: {project: myproject}}
---
apiVersion: v1
kind: Namespace
metadata: {name: other, labels: {project: other}}
---
` + castPod("default/db", 1, "role: db") + castPod("default/frontend", 1, "role: frontend") +
	castPod("default/nginx", 2, "run: nginx") + castPod("default/client", 2, "access: 'true'") +
	castPod("mine/worker", 2, "") + castPod("other/frontend", 1, "role: frontend, access: 'true'") + `
apiVersion: v1
kind: Pod
metadata: {name: on-host, labels: {role: frontend}}
spec:
  nodeName: pc-n2
  hostNetwork: true
  containers: [{name: pause, image: registry.k8s.io/e2e-test-images/agnhost:2.66.1}]
---
` + castService("db", "ClusterIP", "6379", "") +
	castService("db-everywhere", "NodePort", "6379", "nodePort: 30079") +
	castService("db-local", "NodePort", "6379", "nodePort: 30080")

func castPod(key string, node int, labels string) string {
	namespace, name, _ := strings.Cut(key, "/")
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {namespace: %s, name: %s, labels: {%s}}
spec:
  nodeName: pc-n%d
  terminationGracePeriodSeconds: 0
  containers:
  - name: agnhost
    image: registry.k8s.io/e2e-test-images/agnhost:2.66.1
    args: [netexec, --http-port=8080]
    startupProbe: {httpGet: {port: 8080, path: /hostname}, periodSeconds: 1, failureThreshold: 60}
    readinessProbe: {httpGet: {port: 8080, path: /hostname}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}
    livenessProbe: {httpGet: {port: 8080, path: /hostname}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 5}
---
`, namespace, name, labels, node)
}

func castService(name, kind, port, node string) string {
	policy := ""
	if kind == "NodePort" {
		policy = "externalTrafficPolicy: Cluster"
		if strings.HasSuffix(name, "-local") {
			policy = "externalTrafficPolicy: Local"
		}
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s}
spec:
  type: %s
  ipFamilyPolicy: PreferDualStack
  selector: {role: db}
  %s
  ports: [{protocol: TCP, port: %s, %s}]
---
`, name, kind, policy, port, node)
}
