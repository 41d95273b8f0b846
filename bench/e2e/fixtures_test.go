package e2e

import (
	"strings"
	"testing"

	"portcullis/bench/lab"
)

// fixtureWorld has somebody for each clause of the example policies.
func fixtureWorld(t *testing.T, name string, mode lab.Mode) *world {
	w := newWorld(t, name)
	w.lab.AddNamespace("mine", labelMap("project=myproject"))
	w.lab.AddNamespace("other", labelMap("project=other"))
	w.pod(mode, "default/db", 11, "role=db")
	w.pod(mode, "default/frontend", 12, "role=frontend")
	w.pod(mode, "default/nginx", 13, "run=nginx")
	w.pod(mode, "default/client", 14, "access=true")
	w.pod(mode, "mine/worker", 15, "")
	w.pod(mode, "other/frontend", 16, "role=frontend,access=true")
	w.host("docker", "172.17.0.5", "fd00:17::5")
	w.host("docker1", "172.17.1.5", "fd00:17:1::5")
	w.host("ten", "10.0.0.9", "fd00:a::9")
	w.host("ten1", "10.0.1.9", "fd00:a:1::9")
	w.start()
	return w
}

// bothModes runs a test with routed and with bridged pods, in labs of their
// own.
func bothModes(t *testing.T, name string, test func(t *testing.T, name string, mode lab.Mode)) {
	for _, mode := range []lab.Mode{lab.Routed, lab.Bridged} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			test(t, name+"-"+mode.String(), mode)
		})
	}
}

// dbRows are test-network-policy's five statements on the wire.
const dbRows = `
	# The db pods are isolated both ways, others are not.
	deny  tcp  default/client   default/db:6379
	deny  tcp  default/db       default/client:5978
	deny  udp  default/db       default/client:80
	deny  sctp default/db       default/client:80
	deny  icmp default/db       default/client
	deny  icmp default/client   default/db
	allow tcp  default/client   default/nginx:80
	allow tcp  default/client   ten1:80
	# 172.17.0.0/16, but not 172.17.1.0/24, and no IPv6 at all.
	allow tcp4 docker           default/db:6379
	deny  tcp6 docker           default/db:6379
	deny  tcp  docker1          default/db:6379
	deny  tcp  ten              default/db:6379
	# Namespaces labelled project=myproject.
	allow tcp  mine/worker      default/db:6379
	# Pods labelled role=frontend, in the policy's namespace alone.
	allow tcp  default/frontend default/db:6379
	deny  tcp  other/frontend   default/db:6379
	# All of them on TCP 6379 and on nothing else.
	deny  tcp  docker           default/db:80
	deny  tcp  mine/worker      default/db:80
	deny  tcp  default/frontend default/db:5978
	deny  udp  default/frontend default/db:6379
	deny  sctp default/frontend default/db:6379
	deny  icmp default/frontend default/db
	# The db pods reach TCP 5978 of 10.0.0.0/24 and nothing else.
	allow tcp4 default/db       ten:5978
	deny  tcp6 default/db       ten:5978
	deny  tcp  default/db       ten:5979
	deny  udp  default/db       ten:5978
	deny  sctp default/db       ten:5978
	deny  icmp default/db       ten
	deny  tcp  default/db       ten1:5978
	deny  tcp  default/db       docker:5978
	deny  tcp  default/db       default/frontend:5978
`

const nginxRows = `
	allow tcp  default/client   default/nginx:80
	allow udp  default/client   default/nginx:80
	allow sctp default/client   default/nginx:80
	allow icmp default/client   default/nginx
	reach tcp  default/client   default/nginx:81
	deny  tcp  default/frontend default/nginx:80
	deny  udp  default/frontend default/nginx:80
	deny  sctp default/frontend default/nginx:80
	deny  icmp default/frontend default/nginx
	deny  tcp  other/frontend   default/nginx:80    # the label, but another namespace
	deny  tcp  docker           default/nginx:80
	allow tcp  default/nginx    default/frontend:80 # its egress is free
	allow tcp  default/frontend default/client:80
`

const denyIngressRows = `
	deny  tcp  default/client   default/nginx:80
	deny  udp  default/client   default/nginx:80
	deny  sctp default/client   default/nginx:80
	deny  icmp default/client   default/nginx
	deny  tcp  mine/worker      default/db:6379
	deny  tcp  docker           default/db:6379
	allow tcp  default/client   mine/worker:80      # other namespaces are not isolated
	allow tcp  default/client   ten:80              # nor is egress
	allow icmp default/db       other/frontend
	allow tcp  node             default/db:80       # the kubelet's probes
	allow icmp node             default/db
`

const allowIngressRows = `
	allow tcp  default/client   default/nginx:80
	allow udp  mine/worker      default/nginx:80
	allow sctp other/frontend   default/db:80
	allow icmp docker           default/db
	reach tcp  ten1             default/db:81
`

const denyEgressRows = `
	deny  tcp  default/client   default/nginx:80
	deny  udp  default/client   mine/worker:80
	deny  sctp default/client   ten:80
	deny  icmp default/client   docker
	deny  tcp  default/db       ten:5978
	allow tcp  mine/worker      default/db:6379     # ingress is free
	allow icmp docker           default/db
	allow tcp  other/frontend   ten:80
	allow tcp  default/db       192.168.77.10:9999  # the node of the pod
`

const allowEgressRows = `
	allow tcp  default/client   default/nginx:80
	allow udp  default/client   mine/worker:80
	allow sctp default/client   ten:80
	allow icmp default/client   docker
	reach tcp  default/db       ten1:81
`

// fixtures are the example policies, some of them together, and what they say.
var fixtures = []struct {
	files []string
	rows  string
}{
	{[]string{"test-network-policy"}, dbRows},
	{[]string{"access-nginx"}, nginxRows},
	{[]string{"default-deny-ingress"}, denyIngressRows},
	{[]string{"default-deny-ingress", "allow-all-ingress"}, allowIngressRows},
	{[]string{"default-deny-egress"}, denyEgressRows},
	{[]string{"default-deny-egress", "allow-all-egress"}, allowEgressRows},
}

// TestFixtures applies the example policies one after the other: each clause
// is tried where it allows and where it denies, and explain must see it the
// same way.
func TestFixtures(t *testing.T) {
	t.Parallel()
	bothModes(t, "fixtures", func(t *testing.T, name string, mode lab.Mode) {
		w := fixtureWorld(t, name, mode)
		w.must(w.lab.Serve(lab.Node, lab.Port{Proto: lab.TCP, Port: 9999}))
		for _, f := range fixtures {
			w.open(f.rows)
			for _, file := range f.files {
				w.example(file)
			}
			w.settle(f.rows)
			w.expect(f.rows)
			w.agrees(w.rows(f.rows))
			for _, file := range f.files {
				w.remove(file + ".yaml")
			}
			w.settle(allOpen)
		}
	})
}

// allOpen has one row for each way in which an example isolates.
const allOpen = `
	allow tcp default/client default/nginx:80
	allow tcp default/client default/db:80
	allow tcp default/db     ten:80
`

// TestTheWholeMatrix compares all pods, hosts and the node against all with
// what explain foretells, under all the policies that say something together.
func TestTheWholeMatrix(t *testing.T) {
	t.Parallel()
	bothModes(t, "matrix", func(t *testing.T, name string, mode lab.Mode) {
		w := fixtureWorld(t, name, mode)
		w.example("test-network-policy")
		w.example("access-nginx")
		w.apply("more.yaml", policy("mine/out", `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: "fd00::/16"}}]}]}`)+
			"---\n"+policy("other/udp", `{podSelector: {}, ingress: [{ports: [{protocol: UDP, port: 80}]}, {from: [{ipBlock: {cidr: 10.0.0.0/15}}]}]}`))
		w.settle("deny tcp default/frontend default/nginx:80\ndeny tcp default/frontend default/db:80\n" +
			"deny tcp4 mine/worker ten:80\ndeny tcp docker other/frontend:80")
		var all []row
		for _, from := range append(w.lab.Names(), lab.Node) {
			for _, to := range w.lab.Names() {
				if from == to || outside(from) && outside(to) {
					continue
				}
				for _, proto := range []string{"tcp", "udp", "sctp"} {
					all = append(all, w.row([]string{"allow", proto, from, to + ":6379"})...)
					all = append(all, w.row([]string{"allow", proto, from, to + ":80"})...)
				}
				all = append(all, w.row([]string{"allow", "icmp", from, to})...)
			}
		}
		for i, verdict := range w.explained(all) {
			if verdict != "allow" {
				all[i].want, all[i].probe.Timeout = lab.TimedOut, lab.Timeout
			}
		}
		if err := w.wrong(all); err != nil {
			t.Error(err)
		}
		w.bothVerdicts(all)
	})
}

// outside tells hosts, whose names have no namespace, from pods.
func outside(who string) bool { return !strings.Contains(who, "/") }

// bothVerdicts guards against a matrix that agrees because it is empty.
func (w *world) bothVerdicts(rows []row) {
	w.Helper()
	n := map[lab.Outcome]int{}
	for _, r := range rows {
		n[r.want]++
	}
	if n[lab.Connected] < 100 || n[lab.TimedOut] < 100 {
		w.Errorf("too few of one kind to mean anything: %v", n)
	}
}
