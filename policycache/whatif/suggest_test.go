package whatif

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// market is a cluster in which a policy isolates the database for ingress, and
// nobody else.
const market = `
pod shop/db-0 10.0.0.2,fd00::2 app=db statefulset.kubernetes.io/pod-name=db-0 apps.kubernetes.io/pod-index=0
pod shop/db-1 10.0.0.3 app=db statefulset.kubernetes.io/pod-name=db-1 apps.kubernetes.io/pod-index=1
pod shop/db-backup 10.0.0.4 app=db job=backup
pod shop/web-7d4b9c6f5d-x2x1z 10.0.0.5 app=web pod-template-hash=7d4b9c6f5d
pod shop/bare 10.0.0.6
pod edge/proxy 10.0.0.7 app=web
policy shop/db {podSelector: {matchLabels: {app: db}}}
`

// suggested gives the policies for a log, each in words.
func suggested(t *testing.T, o SuggestOptions, conns ...string) ([]string, *SuggestReport) {
	t.Helper()
	if o.Bits4 == 0 {
		o.Bits4, o.Bits6 = 32, 128
	}
	g := NewSuggest(NewState(world(t, market), ""), o)
	readAll(t, g.Add, conns...)
	var all []string
	for _, s := range g.Policies() {
		words := []string{s.Policy.Namespace + "/" + s.Policy.Name, compact(t, s.Policy.Spec.PodSelector)}
		for _, p := range s.Policy.Spec.PolicyTypes {
			words = append(words, string(p))
		}
		for _, r := range s.Policy.Spec.Ingress {
			words = append(words, "from "+compact(t, r.From)+compact(t, r.Ports))
		}
		for _, r := range s.Policy.Spec.Egress {
			words = append(words, "to "+compact(t, r.To)+compact(t, r.Ports))
		}
		all = append(all, strings.Join(words, " "))
	}
	return all, g.Report()
}

// compact writes JSON without what all of it has.
func compact(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	plain := strings.ReplaceAll(string(text), `"`, "")
	return strings.NewReplacer("null", "", "namespaceSelector:{matchLabels:{kubernetes.io/metadata.name:", "namespace:{", "matchLabels:", "", "protocol:TCP,port:", "").Replace(plain)
}

func TestSuggest(t *testing.T) {
	const web, db0, db1, bare = "10.0.0.5=shop/web-7d4b9c6f5d-x2x1z", "10.0.0.2=shop/db-0", "10.0.0.3=shop/db-1", "10.0.0.6=shop/bare"
	const db = "shop/suggested-db {{app:db},matchExpressions:[{key:job,operator:DoesNotExist}]}"
	const fromWeb = "{podSelector:{{app:web}},namespace:{shop}}}"
	for _, tt := range []struct {
		name    string
		options SuggestOptions
		conns   []string
		want    []string
	}{
		{"two pods of a workload, not the one with a label more", SuggestOptions{},
			[]string{"allow/rule eI " + web + " " + db0 + " TCP 5432", "allow/rule eI " + web + " " + db1 + " TCP 9187"},
			[]string{db + " Ingress from [" + fromWeb + "][{5432},{9187}]"}},
		{"what is isolated one way is logged both ways", SuggestOptions{},
			[]string{"allow/not-isolated e " + db0 + " 203.0.113.1 UDP 53"},
			[]string{db + " Egress to [{ipBlock:{cidr:203.0.113.1/32}}][{protocol:UDP,port:53}]"}},
		{"what was denied is no evidence", SuggestOptions{},
			[]string{"deny/no-rule eI " + web + " " + db0 + " TCP 5432", "would-deny/no-rule I 203.0.113.1 " + db0 + " TCP 5432"},
			[]string{db + " Ingress"}},
		{"nor is what needs no rule", SuggestOptions{},
			[]string{"allow/own-node I 192.168.0.1 " + db0 + " TCP 80", "allow/self EI " + db0 + " " + db0 + " TCP 80"},
			[]string{db + " Ingress Egress"}},
		{"or what policy wasn't asked about", SuggestOptions{}, []string{"deny/forged I " + web + " " + db0 + " TCP 80"}, nil},
		{"peers on the same ports share a rule", SuggestOptions{},
			[]string{"allow/rule I 203.0.113.10 " + db0 + " TCP 80", "allow/rule I 203.0.113.9 " + db0 + " TCP 80", "allow/rule I 203.0.113.8 " + db0 + " TCP 81", "allow/rule I " + web + " " + db0 + " TCP 80"},
			[]string{db + " Ingress from [" + fromWeb + ",{ipBlock:{cidr:203.0.113.9/32}},{ipBlock:{cidr:203.0.113.10/32}}][{80}] from [{ipBlock:{cidr:203.0.113.8/32}}][{81}]"}},
		{"prefixes when asked for", SuggestOptions{Bits4: 24, Bits6: 64},
			[]string{"allow/rule I 203.0.113.10 " + db0 + " TCP 80", "allow/rule I 203.0.113.9 " + db0 + " TCP 80", "allow/rule I 2001:db8::9 fd00::2=shop/db-0 TCP 80"},
			[]string{db + " Ingress from [{ipBlock:{cidr:203.0.113.0/24}},{ipBlock:{cidr:2001:db8::/64}}][{80}]"}},
		{"a protocol without ports", SuggestOptions{},
			[]string{"allow/rule I " + web + " " + db0 + " ICMP 8", "allow/rule I " + web + " " + db0 + " TCP 80"},
			[]string{db + " Ingress from [" + fromWeb + "]"}},
		{"who isn't isolated isn't logged whole", SuggestOptions{Namespace: "edge"},
			[]string{"allow/rule eI 10.0.0.7=edge/proxy " + db0 + " TCP 80"}, nil},
		{"unless it is said to be", SuggestOptions{Namespace: "edge", Complete: true},
			[]string{"allow/rule eI 10.0.0.7=edge/proxy " + db0 + " TCP 80"},
			[]string{"edge/suggested-proxy {{app:web}} Egress to [{podSelector:{{app:db},matchExpressions:[{key:job,operator:DoesNotExist}]},namespace:{shop}}}][{80}]"}},
		{"or was isolated when it was logged", SuggestOptions{Namespace: "edge"},
			[]string{"allow/rule EI 10.0.0.7=edge/proxy " + db0 + " TCP 80"},
			[]string{"edge/suggested-proxy {{app:web}} Egress to [{podSelector:{{app:db},matchExpressions:[{key:job,operator:DoesNotExist}]},namespace:{shop}}}][{80}]"}},
		{"or an agent recorded what isn't queued", SuggestOptions{Namespace: "edge"},
			[]string{"allow/not-isolated! e 10.0.0.7=edge/proxy 203.0.113.1 TCP 443", "allow/rule eI 10.0.0.7=edge/proxy " + db0 + " TCP 80"},
			[]string{"edge/suggested-proxy {{app:web}} Egress to [{podSelector:{{app:db},matchExpressions:[{key:job,operator:DoesNotExist}]},namespace:{shop}}}][{80}] to [{ipBlock:{cidr:203.0.113.1/32}}][{443}]"}},
		{"a pod without labels", SuggestOptions{Complete: true},
			[]string{"allow/not-isolated ei " + bare + " " + bare + " TCP 80"},
			[]string{"shop/suggested-bare {matchExpressions:[{key:app,operator:DoesNotExist}]} Ingress Egress from [{podSelector:{matchExpressions:[{key:app,operator:DoesNotExist}]},namespace:{shop}}}][{80}] to [{podSelector:{matchExpressions:[{key:app,operator:DoesNotExist}]},namespace:{shop}}}][{80}]"}},
	} {
		got, _ := suggested(t, tt.options, tt.conns...)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: got\n %s\nwant\n %s", tt.name, strings.Join(got, "\n "), strings.Join(tt.want, "\n "))
		}
	}
}

func TestSuggestReport(t *testing.T) {
	_, r := suggested(t, SuggestOptions{},
		"allow/not-isolated ei 10.0.0.6=shop/bare 10.0.0.5=shop/web-7d4b9c6f5d-x2x1z TCP 80",
		"allow/rule I 203.0.113.1 10.0.0.2=shop/db-0 TCP 0 2", "allow/not-isolated I 203.0.113.1 10.0.0.2=shop/db-0 TCP -",
		"allow/rule I 10.0.0.99=shop/gone 10.0.0.2=shop/db-0 TCP 80 4")
	got := fmt.Sprintf("%d %d %v %v", r.Connections, r.Inadmissible, r.Unisolated, r.NotPlaced)
	if want := `8 3 [shop/bare shop/web] [{there is no pod "shop/gone" 4}]`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// Whatever order a log is in, the suggestions are the same to the byte.
func TestSuggestIsStable(t *testing.T) {
	conns := []string{
		"allow/rule eI 10.0.0.5=shop/web-7d4b9c6f5d-x2x1z 10.0.0.2=shop/db-0 TCP 5432", "allow/rule eI 10.0.0.7=edge/proxy 10.0.0.3=shop/db-1 TCP 5432",
		"allow/rule I 203.0.113.1 10.0.0.2=shop/db-0 UDP 53", "allow/rule I 203.0.113.2 10.0.0.2=shop/db-0 UDP 53",
		"allow/rule e 10.0.0.2=shop/db-0 203.0.113.2 SCTP 53", "deny/no-rule I 203.0.113.2 10.0.0.2=shop/db-0 ICMP 8",
	}
	var first string
	for range len(conns) {
		conns = append(conns[1:], conns[0])
		g := NewSuggest(NewState(world(t, market), ""), SuggestOptions{Complete: true, Bits4: 32, Bits6: 128})
		readAll(t, g.Add, conns...)
		var b bytes.Buffer
		if err := WriteYAML(&b, g.Policies()); err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = b.String()
		}
		if b.String() != first || strings.Count(first, "kind: NetworkPolicy") != 3 {
			t.Fatalf("got\n%s\nand before\n%s", b.String(), first)
		}
	}
}

// Names that suggestions get are valid and no two of a namespace are the same.
func TestFreeName(t *testing.T) {
	taken := map[string]bool{}
	for _, name := range []string{"web", "web", "web", "web-2", strings.Repeat("a.", 126) + "a", strings.Repeat("a.", 126) + "a"} {
		got := freeName(taken, &group{namespace: "n", name: name})
		if why := validation.IsDNS1123Subdomain(got); len(why) > 0 {
			t.Errorf("%s: %v", got, why)
		}
	}
	if len(taken) != 6 || freeName(taken, &group{namespace: "m", name: "web"}) != "suggested-web" {
		t.Errorf("taken are %v", taken)
	}
}

// A comment can't be left, whatever pods are called or there are.
func TestSuggestionComment(t *testing.T) {
	s := subject{group: &group{namespace: "n", name: "w", pods: []string{"w-1", "w-2", "w-3", "w-4", "w-5", "w-6", "w-7"}}}
	s.ingress.judged, s.ingress.denied, s.egress.judged = true, 1, true
	want := "n/w: pods w-1, w-2, w-3, w-4, w-5 and 2 more\n" +
		"No ingress that needs a rule was seen allowed: none is admitted.\nDenied, and no evidence: 1 connection, ingress.\n" +
		"No egress that needs a rule was seen allowed: none is admitted."
	if got := s.comment(); got != want {
		t.Errorf("got %q", got)
	}
	var b bytes.Buffer
	if err := WriteYAML(&b, []Suggestion{{Policy: &networkingv1.NetworkPolicy{}, Comment: want}}); err != nil || strings.Count(b.String(), "\n# ") != 3 {
		t.Errorf("%v:\n%s", err, b.String())
	}
}
