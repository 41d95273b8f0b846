package e2e

import (
	"strings"
	"testing"

	"portcullis/bench/lab"
)

const (
	denyAll     = `{podSelector: {}, policyTypes: [Ingress, Egress]}`
	denyIngress = `{podSelector: {}, policyTypes: [Ingress]}`
)

// TestPolicyFilesWhileRunning adds, changes, breaks, mends and deletes a policy
// file under a running agent.
func TestPolicyFilesWhileRunning(t *testing.T) {
	t.Parallel()
	bothModes(t, "files", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/web", 11, "app=web")
		w.pod(mode, "a/db", 12, "app=db")
		w.start()
		w.expect("allow tcp a/web a/db:80")

		w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}}`))
		w.settle("deny tcp a/web a/db:80\nallow tcp a/db a/web:80")

		fromWeb := `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}]}]}`
		w.apply("db.yaml", policy("a/db", fromWeb))
		w.settle("allow tcp a/web a/db:80\ndeny tcp a/web a/db:6379")

		// Half a file, and one with a field that doesn't exist: the last good
		// state stays in force, and the agent says so.
		for _, broken := range []string{policy("a/db", fromWeb)[:120], policy("a/db", `{podSelector: {}, ingres: []}`)} {
			w.apply("db.yaml", broken)
			w.until("readyz names the broken file", func() error {
				text, err := w.get("/readyz?verbose")
				if err == nil && !strings.Contains(text, "db.yaml") {
					return errNotYet
				}
				return err
			})
			w.expect("allow tcp a/web a/db:80\ndeny tcp a/web a/db:6379")
		}

		// A broken file keeps nobody else's file from being applied.
		w.apply("web.yaml", policy("a/web", `{podSelector: {matchLabels: {app: web}}}`))
		w.settle("deny tcp a/db a/web:80\nallow tcp a/web a/db:80\ndeny tcp a/web a/db:6379")

		w.remove("db.yaml")
		w.settle("allow tcp a/web a/db:6379\ndeny tcp a/db a/web:80")
		w.remove("web.yaml")
		w.settle("allow tcp a/web a/db:6379\nallow tcp a/db a/web:80")
	})
}

// TestPodsComeAndGo makes pods while policy is in force: a new pod is a subject
// and a peer like any other, and an address that changes hands changes rights.
func TestPodsComeAndGo(t *testing.T) {
	t.Parallel()
	bothModes(t, "pods", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/db", 12, "app=db")
		w.apply("db.yaml", policy("a/db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`))
		w.start()

		w.pod(mode, "a/other", 13, "")
		w.pod(mode, "a/web", 11, "app=web")
		w.expect("deny tcp a/web a/db:80") // nobody has told the agent who that is
		w.must(w.lab.Manifests(w.dir))
		w.settle("allow tcp a/web a/db:80\ndeny tcp a/other a/db:80")

		w.pod(mode, "a/db2", 14, "app=db")
		w.must(w.lab.Manifests(w.dir))
		w.settle("allow tcp a/web a/db2:80\ndeny tcp a/other a/db2:80")

		w.must(w.lab.Remove("a/web"))
		w.must(w.lab.Manifests(w.dir))
		w.pod(mode, "a/thief", 11, "")
		w.settle("deny tcp a/thief a/db:80")
		w.must(w.lab.Manifests(w.dir))
		w.settle("deny tcp a/thief a/db:80\nallow tcp a/db a/thief:80")
	})
}

// TestOtherNodes shows whom "a node and its own pods" means: another node's
// address is a stranger's.
func TestOtherNodes(t *testing.T) {
	t.Parallel()
	bothModes(t, "nodes", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/db", 12, "")
		w.host("node-2", "192.168.77.11", "fd00:77::11")
		w.apply("nodes.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node-2}\nstatus: {addresses: "+
			"[{type: InternalIP, address: 192.168.77.11}, {type: InternalIP, address: \"fd00:77::11\"}]}\n")
		w.must(w.lab.Serve(lab.Node, lab.Port{Proto: lab.TCP, Port: 9999}))
		w.apply("deny.yaml", policy("a/deny", denyAll))
		w.start()
		w.expect(`
			allow tcp  node   a/db:80
			allow udp  node   a/db:80
			allow sctp node   a/db:80
			allow icmp node   a/db
			allow tcp  a/db   node:9999
			allow icmp a/db   node
			deny  tcp  node-2 a/db:80
			deny  icmp node-2 a/db
			deny  tcp  a/db   node-2:80
		`)
	})
}

// TestNeighbourDiscovery empties all neighbour tables under a policy that
// denies ICMP: what is allowed still finds its way.
func TestNeighbourDiscovery(t *testing.T) {
	t.Parallel()
	bothModes(t, "neighbours", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/web", 11, "")
		w.pod(mode, "a/db", 12, "")
		w.apply("deny.yaml", policy("a/deny", denyAll)+"---\n"+
			policy("a/tcp", `{podSelector: {}, ingress: [{ports: [{port: 80}]}], egress: [{ports: [{port: 80}]}]}`))
		w.start()
		rows := "allow tcp a/web a/db:80\nallow tcp a/db a/web:80\ndeny icmp a/web a/db\ndeny udp a/web a/db:80"
		w.expect(rows)
		for _, who := range []string{lab.Node, "a/web", "a/db"} {
			for _, family := range []string{"-4", "-6"} {
				_, err := w.lab.Command(t.Context(), who, "ip", family, "neigh", "flush", "all")
				w.must(err)
			}
		}
		w.expect(rows)
	})
}

// TestPortsByNameAndRange has two pods that give one name different numbers.
func TestPortsByNameAndRange(t *testing.T) {
	t.Parallel()
	bothModes(t, "ports", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.pod(mode, "a/client", 11, "")
		w.pod(mode, "a/old", 12, "app=web",
			lab.Port{Proto: lab.TCP, Port: 8080, Name: "http"}, lab.Port{Proto: lab.UDP, Port: 9090, Name: "http"}, lab.Port{Proto: lab.TCP, Port: 9090})
		w.pod(mode, "a/new", 13, "app=web",
			lab.Port{Proto: lab.TCP, Port: 9090, Name: "http"}, lab.Port{Proto: lab.TCP, Port: 8080}, lab.Port{Proto: lab.UDP, Port: 9090})
		w.pod(mode, "a/range", 14, "app=range")
		w.start()
		rows := `
			allow tcp  a/client a/old:8080
			deny  tcp  a/client a/old:9090
			deny  udp  a/client a/old:9090   # the name is there, under another protocol
			allow tcp  a/client a/new:9090
			deny  tcp  a/client a/new:8080
			deny  udp  a/client a/new:9090
		`
		ranges := `
			reach tcp  a/client a/range:8000
			reach tcp  a/client a/range:8001
			reach tcp  a/client a/range:8002
			reach udp  a/client a/range:8001
			reach sctp a/client a/range:8001
		`
		outside := `
			deny  tcp  a/client a/range:7999
			deny  tcp  a/client a/range:8003
			deny  udp  a/client a/range:8000
			deny  udp  a/client a/range:8002
			deny  icmp a/client a/range
		`
		w.open(rows)
		w.expect(ranges)
		w.apply("ports.yaml", policy("a/http", `{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: http}]}]}`)+
			"---\n"+policy("a/range", `{podSelector: {matchLabels: {app: range}}, ingress: [{ports: [{port: 8000, endPort: 8002}, `+
			`{protocol: UDP, port: 8001}, {protocol: SCTP, port: 8001, endPort: 8001}]}]}`))
		w.settle(rows + outside)
		w.expect(rows + ranges + outside)
		w.agrees(w.rows(rows + ranges + outside))
	})
}

// TestInvalidPolicyIsolates applies a policy whose rule makes no sense: it
// shuts its pods off, says so, and leaves the others alone.
func TestInvalidPolicyIsolates(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "invalid")
	w.pod(lab.Routed, "a/web", 11, "")
	w.pod(lab.Routed, "a/db", 12, "app=db")
	w.start()
	w.open("allow tcp a/web a/db:80")
	w.apply("bad.yaml", policy("a/bad", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{ipBlock: {cidr: 10.1.0.0/33}}]}, {ports: [{port: 6379}]}]}`))
	w.settle("deny tcp a/web a/db:80\nallow tcp a/web a/db:6379\nallow tcp a/db a/web:80")
	w.until("the agent names the policy", func() error {
		if !strings.Contains(w.agent.Output(), "a/bad") {
			return errNotYet
		}
		return nil
	})
}
