package explain

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/policycache"
	"portcullis/verdict"
)

// The cluster of these tests: db is isolated for ingress by two policies, one
// of which admits api, a range outside, and (over IPv6 only) web; tied is
// isolated for egress. Job has finished and its address is api's now; old has
// lost its address to db; new has none yet; proxy is in its node's network.
const testPolicies = `
metadata: {namespace: shop, name: db}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: api}}}]
    ports: [{port: postgres, protocol: TCP}]
  - from: [{ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: "fd00::/64"}}]
    ports: [{port: 5432, protocol: TCP}]
---
metadata: {namespace: shop, name: deny}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
---
metadata: {namespace: default, name: tied}
spec: {podSelector: {matchLabels: {app: tied}}, policyTypes: [Egress]}
`

func testCluster(t testing.TB) *Cluster {
	t.Helper()
	o := policycache.NewObjects()
	o.Nodes["n1"] = &policycache.Node{Name: "n1", Addrs: addrs("192.168.0.1 fd01::1")}
	for _, name := range []string{"default", "shop", "kube-system", "empty"} {
		o.Namespaces[name] = &policycache.Namespace{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name}}
	}
	addPod(o, "default/web", "10.0.0.1 fd00::1")
	addPod(o, "default/tied", "10.0.0.7")
	addPod(o, "shop/db", "10.0.0.2 fd00::2")
	addPod(o, "shop/api", "10.0.0.3")
	addPod(o, "shop/six", "fd00::4")
	addPod(o, "shop/new", "").Phase = "Pending"
	addPod(o, "shop/job", "10.0.0.3").Phase = "Succeeded"
	addPod(o, "shop/old", "10.0.0.2").Created = time.Unix(1, 0)
	addPod(o, "kube-system/proxy", "192.168.0.1").HostNetwork = true
	addPod(o, "kube-system/lost", "").HostNetwork = true
	o.Pods["kube-system/lost"].Node = "n9"
	o.Pods["shop/db"].Ports = []verdict.NamedPort{
		{Proto: verdict.TCP, Port: 5432, Name: "postgres"}, {Proto: verdict.UDP, Port: 53, Name: "dns"},
	}
	for _, text := range strings.Split(testPolicies, "---\n") {
		p := new(networkingv1.NetworkPolicy)
		if err := yaml.UnmarshalStrict([]byte(text), p); err != nil {
			t.Fatal(err)
		}
		o.Policies[p.Namespace+"/"+p.Name] = p
	}
	s := policycache.NewCompiler("", slog.New(slog.DiscardHandler)).Compile(o)
	return New(o, s, "")
}

// addPod adds a running pod on n1 whose label app is its name.
func addPod(o *policycache.Objects, key, ips string) *policycache.Pod {
	namespace, name, _ := strings.Cut(key, "/")
	p := &policycache.Pod{
		Namespace: namespace, Name: name, UID: key, Labels: map[string]string{"app": name},
		IPs: addrs(ips), Node: "n1", Phase: "Running", Created: time.Unix(100, 0),
	}
	o.Pods[key] = p
	return p
}

func addrs(text string) (all []netip.Addr) {
	for _, s := range strings.Fields(text) {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

// query reads "tcp FROM TO PORT"; a dash stands for nothing.
func query(text string) Query {
	f := strings.Fields(text)
	for i := range f {
		if f[i] == "-" {
			f[i] = ""
		}
	}
	return Query{Protocol: f[0], From: f[1], To: f[2], Port: f[3]}
}

// golden compares with a file of testdata, or writes it if UPDATE_GOLDEN is
// set.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", name, got, want)
	}
}

func TestEnd(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ name, want string }{
		{"default/web", "default/web (10.0.0.1, fd00::1)"},
		{"web", "default/web (10.0.0.1, fd00::1)"},
		{"10.0.0.1", "default/web (10.0.0.1)"},
		{"fd00::1", "default/web (fd00::1)"},
		{"::ffff:10.0.0.1", "default/web (10.0.0.1)"},
		{"203.0.113.9", "203.0.113.9"},
		{"10.0.0.3", "shop/api (10.0.0.3)"}, // no longer the finished job's
		{"192.168.0.1", "192.168.0.1"},      // the node, not its hostNetwork pod
		{"kube-system/proxy", "kube-system/proxy (192.168.0.1)"},
	} {
		e, err := c.End(tt.name)
		if err != nil {
			t.Errorf("End(%q): %v", tt.name, err)
		} else if got := e.described(); got != tt.want {
			t.Errorf("End(%q) = %s, want %s", tt.name, got, tt.want)
		}
	}
}

func TestEndErrors(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ name, want string }{
		{"", "empty name"},
		{"/", `no pod "/"`},
		{"nobody", `no pod "default/nobody"`},
		{"shop/nobody", `no pod "shop/nobody"`},
		{"a/b/c", `"a/b/c" is neither NS/POD nor an IP`},
		{"10.0.0.1/32", `no pod "10.0.0.1/32"`},
		{"10.0.0.300", `no pod "default/10.0.0.300"`},
		{"fe80::1%eth0", "leave out the zone"},
		{"shop/new", "pod shop/new has no address (yet)"},
		{"shop/job", "pod shop/job has finished (Succeeded): it owns no address"},
		{"shop/old", "pod shop/old doesn't own its address 10.0.0.2: pod shop/db does"},
		{"kube-system/lost", "no address of the node is known"},
		{strings.Repeat("x", 1000), `xxx"...`},
	} {
		_, err := c.End(tt.name)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("End(%.50q): error %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestNamespaceOfBareNames(t *testing.T) {
	c := testCluster(t)
	c = New(c.objects, c.snap, "shop")
	if e, err := c.End("db"); err != nil || e.String() != "shop/db" {
		t.Errorf("db in namespace shop is %v, %v", e, err)
	}
}

// A hostNetwork pod's addresses are its status's, its hostIPs, or its node's.
func TestHostNetworkAddresses(t *testing.T) {
	c := testCluster(t)
	p := *c.objects.Pods["kube-system/proxy"]
	for _, tt := range []struct{ ips, hostIPs, node, want string }{
		{"192.168.0.1", "192.168.0.2", "n1", "x/p (192.168.0.1)"},
		{"", "192.168.0.2", "n1", "x/p (192.168.0.2)"},
		{"", "", "n1", "x/p (192.168.0.1, fd01::1)"},
	} {
		p.Namespace, p.Name, p.IPs, p.HostIPs, p.Node = "x", "p", addrs(tt.ips), addrs(tt.hostIPs), tt.node
		e, err := c.endOfPod(&p)
		if err != nil || e.described() != tt.want {
			t.Errorf("%+v: got %s, %v", tt, e.described(), err)
		}
	}
}

func TestPairs(t *testing.T) {
	for _, tt := range []struct{ from, to, want string }{
		{"10.0.0.1", "10.0.0.2", "10.0.0.1>10.0.0.2"},
		{"10.0.0.1 fd00::1", "fd00::2 10.0.0.2", "fd00::1>fd00::2 10.0.0.1>10.0.0.2"},
		{"fd00::1", "10.0.0.2 fd00::2", "fd00::1>fd00::2"},
		{"10.0.0.1 10.0.0.9", "10.0.0.2 10.0.0.3", "10.0.0.1>10.0.0.2"},
		{"10.0.0.1", "fd00::2", ""},
		{"fd00::1", "10.0.0.2", ""},
	} {
		found, count, err := pairs(End{Addrs: addrs(tt.from)}, End{Addrs: addrs(tt.to)})
		var got []string
		for _, p := range found[:count] {
			got = append(got, p.src.String()+">"+p.dst.String())
		}
		if strings.Join(got, " ") != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%s to %s: got %v, %v, want %s", tt.from, tt.to, got, err, tt.want)
		}
	}
}

func TestNear(t *testing.T) {
	c := testCluster(t)
	addPod(c.objects, "shop/front-7d4b9-x2x1", "10.0.0.9")
	for _, tt := range []struct{ key, want string }{
		{"shop/dd", "shop/db"},
		{"shpo/db", "shop/db"},
		{"default/wbe", "default/web"},
		{"default/api", "shop/api"},
		{"shop/front", "shop/front-7d4b9-x2x1"},
		{"shop/web", "default/web"},
		{"shop/bd", "shop/db"},
		{"shop/entirely-different", ""},
	} {
		got := c.Near(tt.key)
		if len(got) == 0 && tt.want == "" {
			continue
		}
		if len(got) == 0 || got[0] != tt.want || len(got) > 3 {
			t.Errorf("Near(%q) = %v, want %s first", tt.key, got, tt.want)
		}
	}
}

func TestEditDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"web", "web", 0},
		{"web", "wbe", 1}, {"ca", "abc", 3}, {"kitten", "sitting", 3}, {"db", "dbs", 1},
	} {
		if got := editDistance(tt.a, tt.b); got != tt.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
