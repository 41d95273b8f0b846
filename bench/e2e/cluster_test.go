//go:build cluster

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"portcullis/bench/lab"
)

// TestCluster tells the life of the DaemonSet on a real Kubernetes, as its users
// have it, on both kinds of node network, of kube-proxy and of iptables: from kubectl
// apply to the uninstallation that leaves nothing.
func TestCluster(t *testing.T) {
	for _, k := range []kind{{"ptp", "iptables", "nft"}, {"bridge", "nftables", "nft"}, {"ptp", "iptables", "legacy"}} {
		t.Run(k.String(), func(t *testing.T) {
			c := newCluster(t, k)
			c.cast()
			before := c.kernelStates()
			c.install()
			for _, chapter := range []struct {
				name string
				tell func(*cluster)
			}{
				{"the example policies", (*cluster).examples},
				{"services", (*cluster).services},
				{"probes, the node and the API server", (*cluster).probesNodeAndServer},
				{"pods come and go", (*cluster).podsComeAndGo},
				{"no window", (*cluster).noWindow},
				{"a rolling restart", (*cluster).rollingRestart},
				{"a capability is missing", (*cluster).missingCapability},
				{"decisions", (*cluster).decisionsTell},
				{"observe, top and diff", (*cluster).observed},
			} {
				started := time.Now()
				if !t.Run(chapter.name, func(t *testing.T) { chapter.tell(&cluster{c.in(t), k}) }) {
					t.Fatalf("what follows would only fail because of it")
				}
				t.Logf("%s: %s", chapter.name, time.Since(started).Round(time.Second/10))
			}
			c.uninstall(before)
		})
	}
}

// in is the same world for a subtest.
func (w *world) in(t *testing.T) *world {
	clone := *w
	clone.T = t
	return &clone
}

// install applies the one file. Where pods are bridged the node starts with the
// switch off that makes bridged packets pass iptables, and the agent, which isn't
// privileged, must be able to turn it on.
func (c *cluster) install() {
	c.on(1, "echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables; echo 0 >/proc/sys/net/bridge/bridge-nf-call-ip6tables")
	c.kubectl("apply", "-f", filepath.Join(repo, "deploy/portcullis.yaml"))
	c.rolledOut()
	c.applyText(policy("default/all", "{podSelector: {}}")) // whose pods, bridged, need the switch
	c.until("the agent is ready", func() error {
		ready, err := c.lab.HTTPClient(lab.Node).Get("http://127.0.0.1:9353/readyz?verbose")
		if err != nil {
			return err
		}
		defer ready.Body.Close()
		text, err := io.ReadAll(ready.Body)
		if want := "backend " + c.iptables; err == nil && (ready.StatusCode != http.StatusOK || !strings.Contains(string(text), want)) {
			err = fmt.Errorf("%s, want %q:\n%s", ready.Status, want, text)
		}
		return err
	})
	c.settle("deny tcp default/client default/frontend:80\ndeny tcp default/db default/frontend:80")
	want := "0\n"
	if c.cni == "bridge" {
		want = "1\n"
	}
	if got := c.on(1, "cat /proc/sys/net/bridge/bridge-nf-call-iptables"); got != want {
		c.Errorf("with CNI %s bridge-nf-call-iptables is %swant %s", c.cni, got, want)
	}
	c.kubectl("delete", "networkpolicy", "all")
	c.settle(allOpen)
}

// examples applies the example policies, as bench/e2e does in its lab: the same
// rows, by real pods on two nodes.
func (c *cluster) examples() {
	for _, f := range fixtures {
		rows := strings.ReplaceAll(f.rows, "192.168.77.10", "172.30.99.11")
		c.open(rows)
		for _, file := range f.files {
			c.kubectl("apply", "-f", filepath.Join(repo, "deploy/examples", file+".yaml"))
		}
		c.settle(rows)
		c.expect(rows)
		c.agrees(c.rows(rows))
		for _, file := range f.files {
			c.kubectl("delete", "-f", filepath.Join(repo, "deploy/examples", file+".yaml"))
		}
		c.settle(allOpen)
	}
}

// services reaches the database by its Services, whose packets are judged after
// DNAT and before SNAT.
func (c *cluster) services() {
	c.kubectl("apply", "-f", filepath.Join(repo, "deploy/examples/test-network-policy.yaml"))
	defer c.kubectl("delete", "-f", filepath.Join(repo, "deploy/examples/test-network-policy.yaml"))
	var rows strings.Builder
	for _, ip := range c.service("db").Spec.ClusterIPs {
		at := netip.AddrPortFrom(netip.MustParseAddr(ip), 6379).String()
		fmt.Fprintf(&rows, `
			allow tcp default/frontend %[1]s # on one node
			allow tcp mine/worker      %[1]s # from another node
			deny  tcp default/client   %[1]s
			deny  tcp other/frontend   %[1]s
			allow tcp default/db       %[1]s # itself, isolated both ways as it is
		`, at)
	}
	rows.WriteString(`
		# The database's node delivers with the source as it was, or does so before SNAT.
		allow tcp docker  172.30.99.11:30080
		deny  tcp docker1 172.30.99.11:30080
		allow tcp docker  172.30.99.11:30079
		deny  tcp docker1 172.30.99.11:30079
		# By way of another node it comes in that node's name, whom nothing admits.
		deny  tcp docker  172.30.99.12:30079
	`)
	c.settle(rows.String())
	c.expect(rows.String())
	c.applyText(policy("default/nodes", "{podSelector: {matchLabels: {role: db}}, ingress: [{from: [{ipBlock: {cidr: 172.30.99.12/32}}]}]}"))
	c.settle("allow tcp docker 172.30.99.12:30079")
	c.kubectl("delete", "networkpolicy", "nodes")
	c.settle("deny tcp docker 172.30.99.12:30079")
}

func (c *cluster) service(name string) *corev1.Service {
	c.Helper()
	s := new(corev1.Service)
	c.must(json.Unmarshal([]byte(c.kubectl("get", "service", name, "-o", "json")), s))
	return s
}

// probesNodeAndServer closes the namespace both ways: kubelet's probes go on, the
// node reaches its own pods and they it, other nodes don't, a label on a pod of the
// node's network opens nothing, and the API server is reached by whom a policy lets.
func (c *cluster) probesNodeAndServer() {
	c.applyText(policy("default/closed", "{podSelector: {}, policyTypes: [Ingress, Egress]}"))
	c.applyText(policy("default/label", "{podSelector: {matchLabels: {role: db}}, ingress: [{from: [{podSelector: {matchLabels: {role: frontend}}}]}]}"))
	const rows = `
		allow tcp  node      default/db:80
		allow icmp node      default/db
		allow tcp4 default/db 172.30.99.11:9999
		deny  tcp  node2     default/db:80 # where a pod labelled role=frontend has the node's network
		deny  tcp  node      default/nginx:80
		allow tcp  node2     default/nginx:80
	`
	c.settle(rows)
	c.expect(rows)
	c.agrees(c.rows("deny tcp node2 default/db:80\nallow tcp node2 default/nginx:80"))

	server := netip.MustParseAddrPort("10.96.0.1:443")
	if err := c.connect("mine/worker", server); err != nil {
		c.Errorf("a pod that isn't isolated can't reach the API server: %v", err)
	}
	if err := c.connect("default/client", server); err == nil {
		c.Error("an isolated pod reaches the API server")
	}
	c.applyText(policy("default/server", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 172.30.99.1/32}}], ports: [{port: 6443}]}]}"))
	c.until("the API server is reached", func() error { return c.connect("default/client", server) })

	// Several times each probe has been tried and would have been noted.
	unhealthy := func() int {
		return strings.Count(c.kubectl("get", "events", "-n", "default", "--field-selector", "reason=Unhealthy", "-o", "name"), "\n")
	}
	at := unhealthy()
	time.Sleep(4 * time.Second)
	if now := unhealthy(); now != at {
		c.Errorf("kubelet's probes failed %d times", now-at)
	}
	for _, p := range c.pods("default") {
		for _, s := range p.Status.ContainerStatuses {
			if !s.Ready || s.RestartCount > 0 {
				c.Errorf("pod %s: ready %t, %d restarts", p.Name, s.Ready, s.RestartCount)
			}
		}
	}
	c.kubectl("delete", "networkpolicy", "--all")
	c.settle(allOpen)
}

// connect opens a TCP connection and closes it.
func (c *cluster) connect(from string, to netip.AddrPort) error {
	conn, err := c.lab.Open(from, lab.TCP, to, time.Second)
	if err == nil {
		conn.Close()
	}
	return err
}

// podsComeAndGo: a pod's labels, its namespace's, and its end change who may do
// what, at once.
func (c *cluster) podsComeAndGo() {
	c.kubectl("apply", "-f", filepath.Join(repo, "deploy/examples/test-network-policy.yaml"))
	c.settle("deny tcp default/client default/db:6379\ndeny tcp other/frontend default/db:6379")
	c.kubectl("label", "pod", "client", "role=frontend")
	c.settle("allow tcp default/client default/db:6379")
	c.kubectl("label", "pod", "client", "role-")
	c.kubectl("label", "namespace", "other", "project=myproject", "--overwrite")
	c.settle("deny tcp default/client default/db:6379\nallow tcp other/frontend default/db:6379")
	c.kubectl("label", "namespace", "other", "project=other", "--overwrite")
	c.settle("deny tcp other/frontend default/db:6379")

	c.applyText(castPod("default/late", 1, "role: db"))
	c.kubectl("wait", "--for=condition=Ready", "pod/late", "--timeout=60s")
	late := netip.AddrPortFrom(netip.MustParseAddr(c.kubectlLine("get", "pod", "late", "-o", "jsonpath={.status.podIP}")), 8080).String()
	c.expect("deny tcp default/client " + late)
	c.kubectl("delete", "pod", "late")
	c.until("its address has left the set", func() error {
		ip, _, _ := strings.Cut(late, ":")
		if sets := c.on(1, "ipset list"); strings.Contains(sets, ip+"\n") {
			return fmt.Errorf("the set holds\n%s", sets)
		}
		return nil
	})
	c.kubectl("delete", "-f", filepath.Join(repo, "deploy/examples/test-network-policy.yaml"))
	c.settle(allOpen)
}

// noWindow starts pods whose first and only act is a connection that policy denies:
// the first container of a pod must find the gate shut already, although the API
// learns the pod's address only later.
func (c *cluster) noWindow() {
	c.applyText(policy("default/early", "{podSelector: {matchLabels: {early: 'true'}}, policyTypes: [Egress]}"))
	target := c.lab.IP4("default/nginx").String() + ":80"
	c.expect("allow tcp default/client " + target)
	const n = 8
	for i := range n {
		c.applyText(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: early-%d, labels: {early: 'true'}}
spec:
  nodeName: pc-n%d
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers: [{name: first, image: registry.k8s.io/e2e-test-images/agnhost:2.66.1, args: [connect, %q, --timeout=300ms]}]
`, i, 1+i%2, target))
	}
	for i := range n {
		name := fmt.Sprintf("early-%d", i)
		c.kubectl("wait", "--for=jsonpath={.status.containerStatuses[0].state.terminated}", "pod/"+name, "--timeout=60s")
		if said := c.kubectlLine("logs", name); said != "TIMEOUT" {
			c.Errorf("the first connection of pod %s: %q, want TIMEOUT", name, said)
		}
	}
	c.kubectl("delete", "pod", "-l", "early=true")
	c.kubectl("delete", "networkpolicy", "early")
}

func (c *cluster) kubectlLine(args ...string) string {
	c.Helper()
	return strings.TrimSpace(c.kubectl(args...))
}

// rollingRestart replaces each node's agent under a load of new connections, on one
// node and from the other: none fails, hardly one has to send its SYN again (which a gap
// would have hundreds do), each has a record in the log's file, to which the old and the
// new agent write, and what is denied stays denied. What was established goes on.
func (c *cluster) rollingRestart() {
	c.kubectl("apply", "-f", filepath.Join(repo, "deploy/examples/test-network-policy.yaml"))
	const file = "/var/log/portcullis/decisions.log"
	c.kubectl("-n", "portcullis", "patch", "daemonset", "portcullis", "--type=json",
		"-p", fmt.Sprintf(`[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--decision-log=%s"}]`, file))
	c.rolledOut()
	c.settle("deny tcp default/client default/db:6379\nallow tcp default/frontend default/db:6379")
	held := c.hold("default/frontend", "default/db", 6379)
	old := c.agents()
	loads := map[string]*load{"on the node": c.load("default/frontend", "default/db", 6379, 700, 3*patient),
		"from another node": c.load("mine/worker", "default/db", 6379, 300, 3*patient)}
	denied := c.load("default/client", "default/db", 6379, 50, lab.Timeout)
	time.Sleep(time.Second)
	c.kubectl("-n", "portcullis", "rollout", "restart", "daemonset/portcullis")
	c.rolledOut()
	c.lives(held, "the agents were replaced")
	time.Sleep(time.Second)
	for _, l := range loads {
		l.stop()
	}
	denied.stop()
	if now := c.agents(); now == old {
		c.Errorf("the agents are the same as before: %s", now)
	}
	if denied.failed.Load() == 0 || denied.opened.Load() > 0 {
		c.Errorf("denied connections: %s", denied)
	}
	time.Sleep(2 * time.Second) // for the log
	judged := map[netip.AddrPort]int{}
	countJudged(c.world, c.on(1, "cat "+file), "db", 6379, judged)
	for from, l := range loads {
		c.must(l.err)
		unjudged := 0
		for end, n := range l.take() {
			unjudged += max(0, n-judged[end])
		}
		c.Logf("%s: %s, %d without a record", from, l, unjudged)
		if l.failed.Load() > 0 || 100*l.resent.Load() > l.opened.Load() || unjudged > 0 {
			c.Errorf("%s: %s, %d without a record", from, l, unjudged)
		}
	}
	c.expect("allow tcp default/frontend default/db:6379\nallow tcp mine/worker default/db:6379\ndeny tcp other/frontend default/db:6379")
}

// agents names the agents' pods.
func (c *cluster) agents() string {
	c.Helper()
	return c.kubectlLine("-n", "portcullis", "get", "pods", "-o", "name")
}

// missingCapability: without either of its two capabilities the agent doesn't
// enforce but says so, and the gate that its predecessor left stays as it is.
func (c *cluster) missingCapability() {
	for _, only := range []string{"NET_ADMIN", "NET_RAW"} {
		c.kubectl("-n", "portcullis", "patch", "daemonset", "portcullis", "--type=json",
			"-p", fmt.Sprintf(`[{"op": "replace", "path": "/spec/template/spec/containers/0/securityContext/capabilities/add", "value": [%q]}]`, only))
		c.until("an agent says what it lacks", func() error {
			out, _ := exec.Command(filepath.Join(repo, "deploy/cluster/kubectl"), "-n", "portcullis", "logs",
				"-l", "app.kubernetes.io/name=portcullis", "--tail=5").CombinedOutput()
			if !strings.Contains(string(out), "give the container the capabilities NET_ADMIN and NET_RAW") {
				return fmt.Errorf("the agents say: %s", out)
			}
			return nil
		})
		c.expect("deny tcp default/client default/db:6379")
		c.kubectl("-n", "portcullis", "rollout", "undo", "daemonset/portcullis")
		c.rolledOut()
	}
	c.expect("deny tcp default/client default/db:6379\nallow tcp default/frontend default/db:6379")
}

// decisionsTell: kubectl logs says who was turned away, and by which policy.
func (c *cluster) decisionsTell() {
	c.expect("deny tcp4 default/client default/db:6379")
	// A denial is told when its window of ten seconds ends.
	c.untilWithin(3*patient, "the decision is in the agent's output", func() error {
		out, err := exec.Command(filepath.Join(repo, "deploy/cluster/kubectl"), "-n", "portcullis", "logs",
			"-l", "app.kubernetes.io/name=portcullis", "--tail=-1").Output()
		if err != nil {
			return fmt.Errorf("%w, as it may be while a pod goes away", err)
		}
		logs := string(out)
		if strings.Contains(logs, "queue worker isn't scheduled") {
			c.Fatalf("the container's profile forbids what the workers ask for: %s", logs[:min(len(logs), 2000)])
		}
		for text := range strings.Lines(logs) {
			var d line
			if json.Unmarshal([]byte(text), &d) != nil || d.Verdict != "deny" {
				continue
			}
			if d.Src.Pod == "client" && d.Dst.Pod == "db" && d.Dst.Port == 6379 && d.Node == "pc-n1" && d.Ingress != nil &&
				strings.Join(d.Ingress.Policies, " ") == "default/test-network-policy" {
				return nil
			}
		}
		return fmt.Errorf("it isn't among %d bytes of logs", len(logs))
	})
}

// uninstall follows the README, under a policy that closes much: everything is open
// afterwards, and the nodes' kernels are as they were before the installation.
func (c *cluster) uninstall(before [2]string) {
	c.kubectl("apply", "-f", filepath.Join(repo, "deploy/uninstall.yaml"))
	c.rolledOut()
	c.expect("allow tcp default/client default/db:6379\nallow tcp other/frontend default/db:80")
	for i, after := range c.kernelStates() {
		if after != before[i] {
			c.Errorf("node %d before:\n%s\nafter:\n%s", i+1, before[i], after)
		}
	}
	c.kubectl("delete", "-f", filepath.Join(repo, "deploy/portcullis.yaml"), "--timeout=60s")
	if left := c.kubectl("get", "namespaces,clusterroles,clusterrolebindings", "-o", "name"); strings.Contains(left, "portcullis") {
		c.Errorf("left in the cluster:\n%s", left)
	}
}

// kernelStates gives each node's rules of all tables, families and backends, its
// sets, and the connections that bear our mark bits. Counters, comments and the order
// of kube-proxy's rules change by themselves and are left out, and so are legacy
// tables that nobody has made.
func (c *cluster) kernelStates() (states [2]string) {
	c.Helper()
	for i := range states {
		all := c.on(i+1, `for v in "" 6; do
				ip${v}tables-nft-save
				if [ -s /proc/thread-self/net/ip${v}_tables_names ]; then ip${v}tables-legacy-save; fi
			done
			ipset list -n
			for f in ipv4 ipv6; do for bit in 0x1000 0x2000; do conntrack -L -f $f -m $bit/$bit 2>/dev/null; done; done; true`)
		lines := strings.Split(regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$`).ReplaceAllString(all, ""), "\n")
		slices.Sort(lines)
		states[i] = strings.Join(lines, "\n")
	}
	return states
}
