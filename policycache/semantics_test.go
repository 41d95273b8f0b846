package policycache_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/policycache"
	"portcullis/verdict"
)

// town is the cluster that the tables below ask about: a/db is the pod under
// policy, the others are its peers.
func town(t *testing.T, specs ...string) *policycache.Objects {
	t.Helper()
	o := policycache.NewObjects()
	pod := func(ns, name, node string, ips string, ports ...verdict.NamedPort) *policycache.Pod {
		p := &policycache.Pod{Namespace: ns, Name: name, Node: node, Phase: "Running", Labels: map[string]string{"app": name}, Ports: ports}
		for _, ip := range strings.Fields(ips) {
			p.IPs = append(p.IPs, netip.MustParseAddr(ip))
		}
		o.Pods[p.Key()] = p
		return p
	}
	pod("a", "db", "n1", "10.0.1.1 fd00:1::1", verdict.NamedPort{Proto: verdict.TCP, Port: 5432, Name: "sql"}, verdict.NamedPort{Proto: verdict.UDP, Port: 53, Name: "dns"})
	pod("a", "web", "n1", "10.0.1.2 fd00:1::2", verdict.NamedPort{Proto: verdict.TCP, Port: 80, Name: "http"}).Labels["tier"] = "front"
	pod("b", "web", "n2", "10.0.2.1 fd00:2::1", verdict.NamedPort{Proto: verdict.TCP, Port: 8080, Name: "http"})
	pod("c", "job", "n2", "10.0.3.1").Phase = "Succeeded"
	pod("c", "host", "n2", "192.168.0.2").HostNetwork = true
	o.Nodes["n1"] = &policycache.Node{Name: "n1", Addrs: []netip.Addr{netip.MustParseAddr("192.168.0.1")}}
	o.Namespaces["b"] = &policycache.Namespace{Name: "b", Labels: map[string]string{"team": "blue"}}
	for i, spec := range specs {
		p := &networkingv1.NetworkPolicy{}
		p.Namespace, p.Name = "a", fmt.Sprintf("p%d", i)
		if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
			t.Fatalf("%s: %v", spec, err)
		}
		o.Policies["a/"+p.Name] = p
	}
	return o
}

// askAll compares the answers to questions such as "tcp a/web a/db:80".
func askAll(t *testing.T, o *policycache.Objects, questions ...[2]string) {
	t.Helper()
	s := policycache.NewCompiler("", quiet).Compile(o)
	for _, q := range questions {
		f, err := parseFlow(o, strings.Fields(q[0]))
		if err != nil {
			t.Fatal(err)
		}
		d := s.Decide(&f)
		if got := answerOf(&d); got.String() != q[1] {
			t.Errorf("%s: got %v, want %s\n%+v", q[0], got, q[1], got)
		}
		if got := oracle(o, "", f); got.String() != q[1] {
			t.Errorf("%s: the oracle says %v, want %s", q[0], got, q[1])
		}
	}
}

const dbOnly = `podSelector: {matchLabels: {app: db}}, `

func TestIsolation(t *testing.T) {
	const in, out = "tcp b/web a/db:80", "tcp a/db b/web:80"
	const open, shut, shutOut = "allow not-isolated", "deny ingress a/p0", "deny egress a/p0"
	for _, c := range []struct{ spec, in, out string }{
		{`{}`, shut, open},
		{`{policyTypes: []}`, shut, open},
		{`{policyTypes: [Ingress]}`, shut, open},
		{`{policyTypes: [Egress]}`, open, shutOut},
		{`{policyTypes: [Ingress, Egress]}`, shut, shutOut},
		{`{policyTypes: [Egress, Ingress]}`, shut, shutOut},
		{`{policyTypes: [Ingress, Ingress]}`, shut, open},
		{`{policyTypes: [ingress]}`, shut, shutOut},
		{`{policyTypes: [""]}`, shut, shutOut},
		{`{egress: []}`, shut, open},
		{`{egress: [{}]}`, shut, "allow egress a/p0#0"},
		{`{ingress: [{}]}`, "allow ingress a/p0#0", open},
		{`{policyTypes: [Egress], ingress: [{}]}`, open, shutOut},
		{`{policyTypes: [Ingress], egress: [{}]}`, shut, open},
		{`{podSelector: {matchLabels: {app: db}}}`, shut, open},
		{`{podSelector: {matchLabels: {app: other}}}`, open, open},
		{`{podSelector: {matchLabels: {app: ""}}}`, open, open},
		{`{podSelector: {matchExpressions: [{key: tier, operator: DoesNotExist}]}}`, shut, open},
		{`{podSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [front]}]}}`, shut, open},
		{`{podSelector: {matchExpressions: [{key: tier, operator: Exists}]}}`, open, open},
		{`{podSelector: {matchLabels: {app: db}, matchExpressions: [{key: tier, operator: Exists}]}}`, open, open},
		{`{podSelector: {matchLabels: {app: db, "bad key": x}}}`, shut, open},
		{`{podSelector: {matchLabels: {app: other, "bad key": x}}}`, open, open},
		{`{podSelector: {matchExpressions: [{key: app, operator: In, values: []}]}}`, shut, open},
	} {
		t.Run(c.spec, func(t *testing.T) {
			askAll(t, town(t, c.spec), [2]string{in, c.in}, [2]string{out, c.out})
		})
	}
}

func TestIngressRules(t *testing.T) {
	const yes, no = "allow ingress a/p0#0", "deny ingress a/p0"
	for _, c := range []struct{ rule, flow, want string }{
		{`{}`, "gre 203.0.113.9 a/db", yes},
		{`{from: []}`, "tcp 203.0.113.9 a/db:1", yes},
		{`{ports: []}`, "icmp 203.0.113.9 a/db type 8", yes},
		{`{ports: [{}]}`, "tcp a/web a/db:1", yes},
		{`{ports: [{}]}`, "udp a/web a/db:1", no},
		{`{ports: [{protocol: SCTP}]}`, "sctp a/web a/db:1", yes},
		{`{ports: [{protocol: SCTP}]}`, "gre a/web a/db", no},
		{`{ports: [{port: 80}]}`, "tcp a/web a/db:80", yes},
		{`{ports: [{port: 80}]}`, "tcp6 a/web a/db:80", yes},
		{`{ports: [{port: 80}]}`, "icmp a/web a/db type 80", no},
		{`{ports: [{port: 80, endPort: 80}]}`, "tcp a/web a/db:81", no},
		{`{ports: [{port: 80, endPort: 82}]}`, "tcp a/web a/db:82", yes},
		{`{ports: [{port: sql}]}`, "tcp a/web a/db:5432", yes},
		{`{ports: [{port: sql}]}`, "tcp a/web a/db:5433", no},
		{`{ports: [{port: sql, protocol: UDP}]}`, "udp a/web a/db:5432", no},
		{`{ports: [{port: dns}]}`, "tcp a/web a/db:53", no},
		{`{ports: [{port: dns, protocol: UDP}]}`, "udp a/web a/db:53", yes},
		{`{ports: [{port: http}]}`, "tcp a/web a/db:80", no},
		{`{from: [{podSelector: {}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{podSelector: {}}]}`, "tcp b/web a/db:1", no},
		{`{from: [{podSelector: {matchLabels: {app: web}}}]}`, "tcp6 a/web a/db:1", yes},
		{`{from: [{namespaceSelector: {}}]}`, "tcp b/web a/db:1", yes},
		{`{from: [{namespaceSelector: {}}]}`, "tcp 203.0.113.9 a/db:1", no},
		{`{from: [{namespaceSelector: {}}]}`, "tcp c/host a/db:1", no},
		{`{from: [{namespaceSelector: {}}]}`, "tcp c/job a/db:1", no},
		{`{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}`, "tcp b/web a/db:1", yes},
		{`{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: a}}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: DoesNotExist}]}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{namespaceSelector: {}, podSelector: {matchLabels: {tier: front}}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{namespaceSelector: {}, podSelector: {matchLabels: {tier: front}}}]}`, "tcp b/web a/db:1", no},
		{`{from: [{namespaceSelector: {matchLabels: {team: blue}}, podSelector: {}}]}`, "tcp a/web a/db:1", no},
		{`{from: [{ipBlock: {cidr: 10.0.1.0/24}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{ipBlock: {cidr: 10.0.1.0/24}}]}`, "tcp6 a/web a/db:1", no},
		{`{from: [{ipBlock: {cidr: 192.168.0.0/24}}]}`, "tcp c/host a/db:1", yes},
		{`{from: [{ipBlock: {cidr: 10.0.3.0/24}}]}`, "tcp c/job a/db:1", yes},
		{`{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.1.0/24]}}]}`, "tcp a/web a/db:1", no},
		{`{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.1.0/24]}}, {podSelector: {}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.1.0/24]}}, {ipBlock: {cidr: 10.0.1.2/31}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{ipBlock: {cidr: "fd00:1::/64"}}]}`, "tcp6 a/web a/db:1", yes},
		{`{from: [{ipBlock: {cidr: "::ffff:10.0.1.2/128"}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{ipBlock: {cidr: 10.0.1.99/24}}]}`, "tcp a/web a/db:1", yes},
		{`{from: [{ipBlock: {cidr: "::/0"}}]}`, "tcp a/web a/db:1", no},
		{`{from: [{podSelector: {}}], ports: [{port: 80}]}`, "tcp b/web a/db:80", no},
		{`{from: [{podSelector: {}}], ports: [{port: 80}]}`, "tcp a/web a/db:81", no},
		{`{from: [{podSelector: {}}], ports: [{port: 80}]}`, "tcp a/web a/db:80", yes},
		{`{from: [{}]}`, "tcp a/web a/db:1", no},
		{`{from: [{podSelector: {}}, {}]}`, "tcp a/web a/db:1", no},
		{`{ports: [{port: 80}, {port: 0}]}`, "tcp a/web a/db:80", no},
		{`{ports: [{port: "80"}]}`, "tcp a/web a/db:80", no},
		{`{ports: [{port: 80}, {endPort: 9}]}`, "tcp a/web a/db:80", no},
	} {
		t.Run(c.rule+" "+c.flow, func(t *testing.T) {
			askAll(t, town(t, `{`+dbOnly+`ingress: [`+c.rule+`]}`), [2]string{c.flow, c.want})
		})
	}
}

func TestEgressRules(t *testing.T) {
	const yes, no = "allow egress a/p0#0", "deny egress a/p0"
	for _, c := range []struct{ rule, flow, want string }{
		{`{}`, "icmp a/db 203.0.113.9 type 8", yes},
		{`{to: [{ipBlock: {cidr: 203.0.113.0/24}}]}`, "tcp a/db 203.0.113.9:1", yes},
		{`{to: [{ipBlock: {cidr: 203.0.113.0/24}}]}`, "tcp a/db 203.0.112.9:1", no},
		{`{to: [{podSelector: {matchLabels: {app: web}}}]}`, "tcp a/db a/web:1", yes},
		{`{to: [{podSelector: {matchLabels: {app: web}}}]}`, "tcp a/db b/web:1", no},
		{`{to: [{namespaceSelector: {}}]}`, "tcp a/db b/web:1", yes},
		{`{to: [{namespaceSelector: {}}]}`, "tcp a/db c/host:1", no},
		{`{ports: [{port: http}]}`, "tcp a/db a/web:80", yes},
		{`{ports: [{port: http}]}`, "tcp a/db b/web:8080", yes},
		{`{ports: [{port: http}]}`, "tcp a/db b/web:80", no},
		{`{ports: [{port: sql}]}`, "tcp a/db b/web:5432", no},
		{`{ports: [{port: http}]}`, "tcp a/db 203.0.113.9:80", no},
		{`{ports: [{port: http}, {port: 80}]}`, "tcp a/db 203.0.113.9:80", yes},
		{`{to: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: http}]}`, "tcp a/db b/web:8080", yes},
		{`{to: [{namespaceSelector: {matchLabels: {team: blue}}}], ports: [{port: http}]}`, "tcp a/db a/web:80", no},
	} {
		t.Run(c.rule+" "+c.flow, func(t *testing.T) {
			askAll(t, town(t, `{`+dbOnly+`policyTypes: [Egress], egress: [`+c.rule+`]}`), [2]string{c.flow, c.want})
		})
	}
}

// TestSeveralPolicies: policies add up, and the first by name, then by index,
// that admits a flow is the one that is named.
func TestSeveralPolicies(t *testing.T) {
	o := town(t, `{ingress: [{ports: [{port: 1}]}, {ports: [{port: 2}]}]}`, `{ingress: [{ports: [{port: 2}]}, {ports: [{port: 3}]}]}`, `{podSelector: {matchLabels: {app: web}}}`)
	o.Policies["a/p10"] = o.Policies["a/p1"].DeepCopy()
	o.Policies["a/p10"].Name = "p10"
	askAll(t, o,
		[2]string{"tcp b/web a/db:1", "allow ingress a/p0#0"},
		[2]string{"tcp b/web a/db:2", "allow ingress a/p0#1"},
		[2]string{"tcp b/web a/db:3", "allow ingress a/p1#1"},
		[2]string{"tcp b/web a/db:4", "deny ingress a/p0,a/p1,a/p10"},
		[2]string{"tcp b/web a/web:4", "deny ingress a/p0,a/p1,a/p10,a/p2"})
}

// shutTown is a town whose a pods are isolated both ways and reach nobody.
func shutTown(t *testing.T) *policycache.Objects {
	return town(t, `{policyTypes: [Ingress, Egress]}`)
}

func TestExemptions(t *testing.T) {
	const shutIn, shutOut = "deny ingress a/p0", "deny egress a/p0"
	for _, c := range [][2]string{
		{"tcp a/db a/db:80", "allow self"},
		{"tcp 192.168.0.1 a/db:80", "allow own-node"},
		{"tcp a/db 192.168.0.1:80", "allow own-node"},
		{"tcp 192.168.0.2 a/db:80", shutIn},
		{"tcp a/db 192.168.0.2:80", shutOut},
		{"icmp6 b/web a/db type 133", "allow neighbour-discovery"},
		{"icmp6 a/db b/web type 137", "allow neighbour-discovery"},
		{"icmp6 b/web a/db type 132", shutIn},
		{"icmp6 b/web a/db type 138", shutIn},
		{"icmp6 10.0.2.1 10.0.1.1 type 135", shutIn},
		{"tcp b/web a/db:80 truncated", "deny truncated"},
		{"tcp a/db b/web:80 fragment", "deny fragment"},
		{"tcp b/web 203.0.113.9:80 malformed", "allow not-isolated"},
	} {
		t.Run(c[0], func(t *testing.T) { askAll(t, shutTown(t), c) })
	}
}

// TestExemptSides: an exemption is reported with the isolation that it
// overrides, and as allowed by no rule.
func TestExemptSides(t *testing.T) {
	o := shutTown(t)
	s := policycache.NewCompiler("", quiet).Compile(o)
	d := s.Decide(&verdict.Flow{Src: o.Pods["a/db"].IPs[0], Dst: o.Pods["a/db"].IPs[0], Proto: verdict.TCP})
	want := answerSide{Judged: true, Isolated: true, Verdict: verdict.Allow, Policies: "a/p0"}
	if got := answerOf(&d); got.Egress != want || got.Ingress != want {
		t.Errorf("got %+v, want both sides %+v", got, want)
	}
}

// TestUnreadable: a packet without addresses is nobody's, and is denied though
// no end of it is known to be isolated.
func TestUnreadable(t *testing.T) {
	s := policycache.NewCompiler("", quiet).Compile(town(t))
	d := s.Decide(&verdict.Flow{Defect: verdict.ReasonTruncated})
	if got := answerOf(&d).String(); got != "deny truncated" {
		t.Errorf("got %s", got)
	}
}

// TestNode: an agent judges the ends that are on its node, and no others.
func TestNode(t *testing.T) {
	o := shutTown(t)
	for _, c := range []struct{ node, want, addrs string }{
		{"", "deny egress a/p0 ingress a/p0", "10.0.1.1 10.0.1.2 fd00:1::1 fd00:1::2"},
		{"n1", "deny egress a/p0 ingress a/p0", "10.0.1.1 10.0.1.2 fd00:1::1 fd00:1::2"},
		{"n2", "allow not-isolated", ""},
		{"nowhere", "allow not-isolated", ""},
	} {
		s := policycache.NewCompiler(c.node, quiet).Compile(o)
		d := s.Decide(&verdict.Flow{Src: o.Pods["a/web"].IPs[0], Dst: o.Pods["a/db"].IPs[0], Proto: verdict.TCP, DstPort: 80})
		if got := answerOf(&d).String(); got != c.want {
			t.Errorf("node %q: got %s, want %s", c.node, got, c.want)
		}
		if got := strings.Trim(fmt.Sprint(s.IsolatedAddrs()), "[]"); got != c.addrs {
			t.Errorf("node %q: isolated %s, want %s", c.node, got, c.addrs)
		}
	}
}

// TestEndpoint: an address that a live pod owns is that pod, any other nobody's.
func TestEndpoint(t *testing.T) {
	o := town(t)
	s := policycache.NewCompiler("", quiet).Compile(o)
	for addr, want := range map[string]string{"10.0.1.1": "a/db", "fd00:2::1": "b/web", "::ffff:10.0.1.1": "a/db", "10.0.3.1": "", "192.168.0.2": "", "203.0.113.9": ""} {
		got := ""
		if e := s.Endpoint(netip.MustParseAddr(addr)); e != nil {
			got = e.Key()
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", addr, got, want)
		}
	}
}

// TestBeforeFirstSwap: as long as no policy is compiled, the gate is shut.
func TestBeforeFirstSwap(t *testing.T) {
	w := verdict.NewEngine().NewWorker(8)
	d := w.Decide(&verdict.Flow{Src: netip.MustParseAddr("10.0.1.1"), Dst: netip.MustParseAddr("10.0.1.2"), Proto: verdict.TCP})
	if d.Verdict != verdict.Deny {
		t.Errorf("got %+v", d)
	}
}

// TestCacheAcrossChanges: a client's next connection is a hit; what changes
// elsewhere leaves it one; what concerns either end doesn't.
func TestCacheAcrossChanges(t *testing.T) {
	changePod := func(o *policycache.Objects, key string, change func(*policycache.Pod)) {
		p := *o.Pods[key]
		change(&p)
		o.Pods[key] = &p
	}
	for _, c := range []struct {
		name   string
		cached bool
		change func(o *policycache.Objects)
	}{
		{"nothing", true, func(*policycache.Objects) {}},
		{"a pod elsewhere goes", true, func(o *policycache.Objects) { delete(o.Pods, "b/web") }},
		{"a pod elsewhere comes", true, func(o *policycache.Objects) {
			changePod(o, "b/web", func(p *policycache.Pod) { p.Name, p.IPs = "web2", []netip.Addr{netip.MustParseAddr("10.0.2.2")} })
		}},
		{"a pod elsewhere has new labels", true, func(o *policycache.Objects) {
			changePod(o, "b/web", func(p *policycache.Pod) { p.Labels = map[string]string{"app": "web", "v": "2"} })
		}},
		{"the policy changes", false, func(o *policycache.Objects) {
			p := o.Policies["a/p0"].DeepCopy()
			p.Spec.Ingress = nil
			o.Policies["a/p0"] = p
		}},
		{"the policy goes", false, func(o *policycache.Objects) { delete(o.Policies, "a/p0") }},
		{"the peer has new labels", false, func(o *policycache.Objects) {
			changePod(o, "a/web", func(p *policycache.Pod) { p.Labels = map[string]string{"app": "db"} })
		}},
		{"the peer goes", false, func(o *policycache.Objects) { delete(o.Pods, "a/web") }},
		{"the subject moves away", false, func(o *policycache.Objects) {
			changePod(o, "a/db", func(p *policycache.Pod) { p.IPs = p.IPs[1:] })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := town(t, `{`+dbOnly+`ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}`)
			compiler, engine := policycache.NewCompiler("", quiet), verdict.NewEngine()
			w := engine.NewWorker(64)
			f := verdict.Flow{Src: o.Pods["a/web"].IPs[0], Dst: o.Pods["a/db"].IPs[0], Proto: verdict.TCP, SrcPort: 1, DstPort: 80}
			engine.Swap(compiler.Compile(o))
			if w.Decide(&f).Cached {
				t.Error("the first connection is said to come from the cache")
			}
			f.SrcPort = 2
			if !w.Decide(&f).Cached {
				t.Error("the second connection missed")
			}
			next := clone(o, true)
			c.change(next)
			engine.Swap(compiler.Compile(next))
			d := w.Decide(&f)
			if d.Cached != c.cached {
				t.Errorf("cached %v after the change, want %v", d.Cached, c.cached)
			}
			if got, want := answerOf(d), oracle(next, "", f); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// TestCachedNamedPort: a verdict by a named port of the destination doesn't
// outlive the port's number.
func TestCachedNamedPort(t *testing.T) {
	o := town(t, `{`+dbOnly+`policyTypes: [Egress], egress: [{ports: [{port: http}]}]}`)
	compiler, engine := policycache.NewCompiler("", quiet), verdict.NewEngine()
	w := engine.NewWorker(64)
	f := verdict.Flow{Src: o.Pods["a/db"].IPs[0], Dst: o.Pods["b/web"].IPs[0], Proto: verdict.TCP, DstPort: 8080}
	ask := func(want string) {
		t.Helper()
		engine.Swap(compiler.Compile(o))
		if got := answerOf(w.Decide(&f)).String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	ask("allow egress a/p0#0")
	o = clone(o, false)
	moved := *o.Pods["b/web"]
	moved.Ports = []verdict.NamedPort{{Proto: verdict.TCP, Port: 9090, Name: "http"}}
	o.Pods["b/web"] = &moved
	ask("deny egress a/p0")
	f.DstPort = 9090
	ask("allow egress a/p0#0")
}

// TestComplaints: what is wrong with an object is told once, however often it
// is compiled, and for as long as it is wrong it is among the problems.
func TestComplaints(t *testing.T) {
	var out bytes.Buffer
	compiler := policycache.NewCompiler("", slog.New(slog.NewTextHandler(&out, nil)))
	o := town(t, `{ingress: [{ports: [{port: 80, endPort: 79}]}]}`, `{ingress: [{ports: [{port: 80}]}]}`)
	twin := *o.Pods["a/web"]
	twin.Name, twin.Created = "twin", genEpoch
	o.Pods["a/twin"] = &twin
	for range 3 {
		compiler.Compile(clone(o, true))
	}
	text := out.String()
	if n := strings.Count(text, "a/p0"); n != 1 {
		t.Errorf("the invalid policy is named %d times:\n%s", n, text)
	}
	if strings.Contains(text, "a/p1") || !strings.Contains(text, "a/twin") || !strings.Contains(text, "10.0.1.2") {
		t.Errorf("a/p1 is valid, a/twin has a/web's addresses:\n%s", text)
	}
	if got := problemsOf(compiler); !slices.Equal(got, []string{"networkpolicy a/p0", "pod a/twin"}) {
		t.Errorf("problems: %q", got)
	}
	good := clone(o, true)
	delete(good.Policies, "a/p0")
	delete(good.Pods, "a/twin")
	compiler.Compile(good)
	if got := problemsOf(compiler); len(got) != 0 {
		t.Errorf("problems after both are gone: %q", got)
	}
}

func problemsOf(c *policycache.Compiler) []string {
	var all []string
	for _, p := range c.Problems() {
		all = append(all, p.Object)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// TestCompileLeavesObjectsAlone: what is handed over isn't written to.
func TestCompileLeavesObjectsAlone(t *testing.T) {
	for seed := range uint64(50) {
		o := newDice(seed).cluster()
		before := dump(o)
		policycache.NewCompiler("", quiet).Compile(o)
		if after := dump(o); after != before {
			t.Fatalf("seed %d: compiling changed\n%s\ninto\n%s", seed, before, after)
		}
	}
}
