package policycache_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/policycache"
)

// large makes a policy for a/db that is as large as may be in one way, or larger.
func large(kind string, n int) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{}
	p.Namespace, p.Name = "a", "large"
	p.Spec.PodSelector = metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}
	block := func(i int) networkingv1.NetworkPolicyPeer {
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("10.%d.%d.0/%d", 100+i>>8, i&255, 24+i%9)}}
	}
	nested := func(i int) networkingv1.NetworkPolicyPeer { // one inside the other, again and again
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("10.%d.%d.%d/%d", i>>11, (i>>3)&255, (i&7)<<5, 8+i%25)}}
	}
	port := func(i int) networkingv1.NetworkPolicyPort {
		at := intstr.FromInt32(int32(1 + i*6%65000))
		last := at.IntVal + int32(i%500)
		return networkingv1.NetworkPolicyPort{Port: &at, EndPort: &last}
	}
	selector := func(i int) networkingv1.NetworkPolicyPeer {
		return networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"number": fmt.Sprint(i)}}}
	}
	rules, inOne := []networkingv1.NetworkPolicyIngressRule{}, networkingv1.NetworkPolicyIngressRule{}
	for i := range n {
		switch kind {
		case "CIDRs in one rule":
			inOne.From = append(inOne.From, block(i))
		case "ports in one rule":
			inOne.Ports = append(inOne.Ports, port(i))
		case "selectors in one rule":
			if i%2 == 0 { // a selector with a label counts as two
				inOne.From = append(inOne.From, selector(i))
			}
		case "rules of a CIDR and a port":
			rules = append(rules, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{block(i)}, Ports: []networkingv1.NetworkPolicyPort{port(i)}})
		case "rules of nested CIDRs and ranges":
			rules = append(rules, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{nested(i)}, Ports: []networkingv1.NetworkPolicyPort{port(i)}})
		case "rules of a selector":
			if i%2 == 0 {
				rules = append(rules, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{selector(i)}})
			}
		case "rules with a named port":
			at := intstr.FromString("sql")
			if i < n/10 {
				rules = append(rules, networkingv1.NetworkPolicyIngressRule{Ports: []networkingv1.NetworkPolicyPort{{Port: &at}}})
			}
		case "exceptions":
			if i == 0 {
				inOne.From = append(inOne.From, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8"}})
				continue
			}
			b := inOne.From[0].IPBlock
			b.Except = append(b.Except, fmt.Sprintf("10.%d.%d.0/24", 100+i>>8, i&255))
		}
	}
	if p.Spec.Ingress = rules; len(rules) == 0 {
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{inOne}
	}
	return p
}

var largeKinds = []string{"CIDRs in one rule", "ports in one rule", "selectors in one rule", "rules of a CIDR and a port",
	"rules of nested CIDRs and ranges", "rules of a selector", "rules with a named port", "exceptions"}

// TestLargePolicies compiles policies that are as large as may be, beside one that
// isn't: it takes a bounded time, a bounded memory, and they mean what they say.
func TestLargePolicies(t *testing.T) {
	for _, kind := range largeKinds {
		o := town(t)
		p := large(kind, policycache.MaxPolicyParts)
		o.Policies["a/large"] = p
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		c := policycache.NewCompiler("n1", quiet)
		start := time.Now()
		s := c.Compile(o)
		took := time.Since(start)
		runtime.GC()
		runtime.ReadMemStats(&after)
		kept := int64(after.HeapAlloc) - int64(before.HeapAlloc)
		t.Logf("%s: compiled in %s, %d KiB kept", kind, took.Round(time.Millisecond), kept>>10)
		if len(c.Problems()) != 0 {
			t.Errorf("%s: %v", kind, c.Problems())
		}
		if took > 20*time.Second || kept > 256<<20 {
			t.Errorf("%s: took %s and %d MiB", kind, took, kept>>20)
		}
		for _, q := range []string{"tcp a/web a/db:5432", "tcp 10.100.0.1 a/db:1", "tcp 10.120.7.0 a/db:6000", "udp b/web a/db:53", "tcp 10.3.4.5 a/db:40000"} {
			f, err := parseFlow(o, strings.Fields(q))
			if err != nil {
				t.Fatal(err)
			}
			d := s.Decide(&f)
			if got, want := answerOf(&d), oracle(o, "n1", f); got != want {
				t.Errorf("%s: %s: got %+v, the oracle says %+v", kind, q, got, want)
			}
		}
		runtime.KeepAlive(c)
	}
}

// TestTooLargePolicies: what is larger isolates, allows nothing, is named with what
// is too many, and leaves other policies alone.
func TestTooLargePolicies(t *testing.T) {
	for _, kind := range largeKinds {
		o := town(t, "{"+dbOnly+"ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}")
		o.Policies["a/large"] = large(kind, policycache.MaxPolicyParts+10)
		if kind == "exceptions" || strings.HasPrefix(kind, "CIDRs") { // one of them is everybody
			o.Policies["a/large"].Spec.Ingress[0].From[0].IPBlock.CIDR = "0.0.0.0/0"
		}
		c := policycache.NewCompiler("n1", quiet)
		s := c.Compile(o)
		if got := c.Problems(); len(got) != 1 || !strings.Contains(fmt.Sprint(got), "a/large") || !strings.Contains(fmt.Sprint(got), "at most 10") {
			t.Errorf("%s: problems %v", kind, got)
		}
		for q, want := range map[string]string{"tcp 8.8.8.8 a/db:80": "deny ingress a/large,a/p0", "tcp a/web a/db:80": "allow ingress a/p0#0"} {
			f, err := parseFlow(o, strings.Fields(q))
			if err != nil {
				t.Fatal(err)
			}
			d := s.Decide(&f)
			if got := answerOf(&d).String(); got != want {
				t.Errorf("%s: %s: %s, want %s", kind, q, got, want)
			}
		}
		// It is taken again as soon as it is small enough.
		o.Policies = map[string]*networkingv1.NetworkPolicy{"a/large": large(kind, 100)}
		if s = c.Compile(o); len(c.Problems()) != 0 || s == nil {
			t.Errorf("%s: made smaller, and still %v", kind, c.Problems())
		}
	}
}
