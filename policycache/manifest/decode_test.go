package manifest

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"

	"portcullis/policycache"
)

// keys names a state's objects, in order: "node n1, ns shop, pod shop/a, policy shop/p".
func keys(o *policycache.Objects) string {
	var all []string
	for k := range maps.Keys(o.Pods) {
		all = append(all, "pod "+k)
	}
	for k := range maps.Keys(o.Namespaces) {
		all = append(all, "ns "+k)
	}
	for k := range maps.Keys(o.Nodes) {
		all = append(all, "node "+k)
	}
	for k := range maps.Keys(o.Policies) {
		all = append(all, "policy "+k)
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func decodeText(text string) (objs *policycache.Objects, errs string) {
	objs, all := decode("file.yaml", []byte(text), slog.New(slog.DiscardHandler))
	var lines []string
	for _, err := range all {
		lines = append(lines, err.Error())
	}
	return objs, strings.Join(lines, "\n")
}

const (
	podA   = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
	podB   = "apiVersion: v1\nkind: Pod\nmetadata: {name: b, namespace: shop}\n"
	polHdr = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\n"
	polP   = polHdr + "spec: {podSelector: {}}\n"
	jsonA  = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}`
	jsonB  = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"b"}}`
)

func TestDecodeDocuments(t *testing.T) {
	for _, c := range []struct{ rule, text, want string }{
		{"nothing", "", ""},
		{"only comments", "# nothing\n\n# here\n", ""},
		{"one", podA, "pod default/a"},
		{"two", podA + "---\n" + podB, "pod default/a, pod shop/b"},
		{"separators at both ends", "---\n" + podA + "---\n", "pod default/a"},
		{"comments beside separators", "# licence\n--- # first\n" + podA + "--- # second\n" + podB, "pod default/a, pod shop/b"},
		{"empty and comment-only documents", "---\n---\n# no\n---\nnull\n---\n" + podA + "---\n\n---\n" + podB, "pod default/a, pod shop/b"},
		{"a document end marker", podA + "...\n---\n" + podB + "...\n", "pod default/a, pod shop/b"},
		{"a separator inside a string isn't one", podA + "spec: {nodeName: \"a --- b\"}\n", "pod default/a"},
		{"CRLF", strings.ReplaceAll(podA+"---\n"+polP, "\n", "\r\n"), "pod default/a, policy default/p"},
		{"BOM", "\xef\xbb\xbf" + podA, "pod default/a"},
		{"BOM before JSON", "\xef\xbb\xbf" + jsonA, "pod default/a"},
		{"JSON", jsonA, "pod default/a"},
		{"JSON in a row", jsonA + jsonB + "\n" + jsonA, "pod default/a, pod default/b"},
		{"JSON between separators", jsonA + "\n---\n" + jsonB, "pod default/a, pod default/b"},
		{"JSON with tabs", "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Node\",\n\t\"metadata\": {\n\t\t\"name\": \"n\"\n\t}\n}\n", "node n"},
		{"flow YAML", "{apiVersion: v1, kind: Pod, metadata: {name: a}}", "pod default/a"},
		{"all kinds", podA + "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n" + polP, "node n1, ns shop, pod default/a, policy default/p"},
		{"cluster objects have no namespace", "apiVersion: v1\nkind: Node\nmetadata: {name: n1, namespace: x}", "node n1"},
		{"other kinds", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s}\n", ""},
		{"other projects' policies", "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {order: 1}\n", ""},
		{"other lists", "apiVersion: apps/v1\nkind: DeploymentList\nitems: [{}]\n", ""},
		{"unknown fields of a pod", podA + "spec: {novelty: 1, nodeName: n1}\nmore: []\n", "pod default/a"},
		{"twice in one file", podA + "---\n" + podA, "pod default/a"},
		{"anchors", podA + "x: &l {p: q}\ny: *l\n", "pod default/a"},
	} {
		objs, errs := decodeText(c.text)
		if got := keys(objs); got != c.want || errs != "" {
			t.Errorf("%s: got %q, want %q; errors: %s", c.rule, got, c.want, errs)
		}
	}
}

func TestDecodeLists(t *testing.T) {
	items := func(items ...string) string { return `,"items":[` + strings.Join(items, ",") + `]}` }
	bare := func(name string) string { return `{"metadata":{"name":"` + name + `"}}` }
	for _, c := range []struct{ rule, text, want string }{
		{"List", `{"apiVersion":"v1","kind":"List","metadata":{"resourceVersion":""}` + items(jsonA, jsonB), "pod default/a, pod default/b"},
		{"List in YAML", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n- apiVersion: apps/v1\n  kind: Deployment\n", "pod default/a"},
		{"an empty List", "apiVersion: v1\nkind: List\n", ""},
		{"null items", "apiVersion: v1\nkind: List\nitems:\n", ""},
		{"a List in a List", `{"apiVersion":"v1","kind":"List"` + items(`{"apiVersion":"v1","kind":"List"`+items(jsonA)), "pod default/a"},
		{"PodList", `{"apiVersion":"v1","kind":"PodList","metadata":{"resourceVersion":"7"}` + items(bare("a"), jsonB), "pod default/a, pod default/b"},
		{"NodeList", `{"apiVersion":"v1","kind":"NodeList"` + items(bare("n")), "node n"},
		{"NamespaceList", `{"apiVersion":"v1","kind":"NamespaceList"` + items(bare("n")), "ns n"},
		{"NetworkPolicyList", `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicyList"` + items(bare("p")), "policy default/p"},
	} {
		objs, errs := decodeText(c.text)
		if got := keys(objs); got != c.want || errs != "" {
			t.Errorf("%s: got %q, want %q; errors: %s", c.rule, got, c.want, errs)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	const doc1, pol1 = "document 1: ", "document 1: NetworkPolicy default/p: "
	deep := strings.Repeat(`{"apiVersion":"v1","kind":"List","items":[`, 9) + strings.Repeat("]}", 9)
	for _, c := range []struct{ rule, text, want string }{
		{"unknown field", polHdr + "spec: {podSelector: {}, ingres: []}", pol1 + `unknown field "spec.ingres"`},
		{"unknown field, deep", polHdr + "spec: {ingress: [{from: [{podSelektor: {}}]}]}", pol1 + `unknown field "spec.ingress[0].from[0].podSelektor"`},
		{"unknown field at the top", polHdr + "specs: {}", pol1 + `unknown field "specs"`},
		{"two unknown fields", polHdr + "spec: {a: 1, b: 2}", pol1 + `unknown field "spec.a", unknown field "spec.b"`},
		{"the case of a field counts", polHdr + "spec: {podselector: {}}", pol1 + `unknown field "spec.podselector"`},
		{"second document", podA + "---\n" + polHdr + "spec: {x: 1}", `document 2: NetworkPolicy default/p: unknown field "spec.x"`},
		{"the file's other documents are looked at too", polHdr + "spec: {x: 1}\n---\n" + polHdr + "spec: {z: 1}", pol1 + `unknown field "spec.x"` + "\n" + `document 2: NetworkPolicy default/p: unknown field "spec.z"`},
		{"double field", polHdr + "spec:\n  podSelector: {}\n  podSelector: {a: b}\n", pol1 + `line 6: key "podSelector" already set in map`},
		{"double field in a pod", podA + "kind: Pod\n", `document 1: Pod default/a: line 4: key "kind" already set in map`},
		{"double field in JSON", `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"p"},"spec":{"ingress":[],"ingress":[{}]}}`, pol1 + `duplicate field "spec.ingress"`},
		{"double kind in JSON", `{"apiVersion":"v1","kind":"NetworkPolicy","kind":"Secret"}`, doc1 + `duplicate field "kind"`},
		{"double field in JSON, pod", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","labels":{"x":"1","x":"2"}}}`, `document 1: Pod default/a: duplicate field "metadata.labels.x"`},
		{"keys that are one in JSON", podA + "x: {1: a, \"1\": b}\n", doc1 + `key "1" appears twice`},
		{"list where object", polHdr + "spec: {podSelector: []}", pol1 + "spec.podSelector: array where an object is expected"},
		{"object where list", polHdr + "spec: {ingress: {}}", pol1 + "spec.ingress: object where a list is expected"},
		{"number where string", polHdr + "spec: {ingress: [{ports: [{protocol: 6}]}]}", pol1 + "spec.ingress.ports.protocol: number where a string is expected"},
		{"boolean label", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {access: true}}", "document 1: Pod default/a: metadata.labels: bool where a string is expected"},
		{"string endPort", polHdr + "spec: {ingress: [{ports: [{port: 80, endPort: '90'}]}]}", pol1 + "spec.ingress.ports.endPort: string where a value of type int32 is expected"},
		{"a fraction of a port", polHdr + "spec: {ingress: [{ports: [{port: 80.5}]}]}", pol1 + "spec.ingress.ports.port: number 80.5 where a value of type int32 is expected"},
		{"a pod's address that is none", podA + "status: {podIP: 10.0.0.300, podIPs: [{ip: 10.0.0.300}, {ip: fd00::1}]}", "document 1: Pod default/a: status.podIP: \"10.0.0.300\" is not an IP address\ndocument 1: Pod default/a: status.podIPs[0].ip: \"10.0.0.300\" is not an IP address"},
		{"a pod's address with a zone", podA + "status: {podIP: fe80::1%eth0}", `document 1: Pod default/a: status.podIP: "fe80::1%eth0" is not an IP address`},
		{"no address yet", podA + "status: {podIP: '', podIPs: []}", ""},
		{"an empty rule by mistake", polHdr + "spec:\n  ingress:\n  -\n", pol1 + "spec.ingress[0] is empty (null): write {} if it is meant to match everything"},
		{"an empty port by mistake", polHdr + "spec:\n  egress:\n  - ports:\n    - port: 1\n    -\n", pol1 + "spec.egress[0].ports[1] is empty (null): write {} if it is meant to match everything"},
		{"an old API", "apiVersion: extensions/v1beta1\nkind: NetworkPolicy\nmetadata: {name: p}", pol1 + "extensions/v1beta1 NetworkPolicy isn't supported, only networking.k8s.io/v1 NetworkPolicy is"},
		{"an API to come", "apiVersion: networking.k8s.io/v2\nkind: NetworkPolicy\nmetadata: {name: p}", pol1 + "networking.k8s.io/v2 NetworkPolicy isn't supported, only networking.k8s.io/v1 NetworkPolicy is"},
		{"an old API's list", "apiVersion: extensions/v1beta1\nkind: NetworkPolicyList\nitems: []", "document 1: NetworkPolicyList: extensions/v1beta1 NetworkPolicyList isn't supported, only networking.k8s.io/v1 NetworkPolicy is"},
		{"a misspelt kind", "apiVersion: networking.k8s.io/v1\nkind: Networkpolicy\nmetadata: {name: p}", "document 1: Networkpolicy default/p: networking.k8s.io/v1 Networkpolicy isn't supported, only networking.k8s.io/v1 NetworkPolicy is"},
		{"a misspelt List", "apiVersion: v1\nkind: list\nitems: []", "document 1: list: v1 list isn't supported, only v1 List is"},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}", doc1 + "no apiVersion or no kind: not a Kubernetes object"},
		{"no apiVersion", "kind: Pod\nmetadata: {name: a}", doc1 + "no apiVersion or no kind: not a Kubernetes object"},
		{"no name", "apiVersion: v1\nkind: Pod\n", "document 1: Pod: metadata.name is missing"},
		{"a generated name is none", "apiVersion: v1\nkind: Pod\nmetadata: {generateName: a-}", "document 1: Pod: metadata.name is missing"},
		{"no name, policy", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nspec: {}", "document 1: NetworkPolicy: metadata.name is missing"},
		{"a list document", "- a\n- b\n", doc1 + "value: array where an object is expected"},
		{"a scalar document", "hello\n", doc1 + "value: string where an object is expected"},
		{"invalid YAML", podA + "---\na: [\n", "document 2: yaml: line 5: did not find expected node content"},
		{"content after a document's end", podA + "]\n", "document 1: yaml: line 3: did not find expected key"},
		{"flow documents in a row", "{apiVersion: v1, kind: Secret} {apiVersion: v1, kind: Secret}", "document 2: yaml: did not find expected <document start>"},
		{"misspelt items", "apiVersion: v1\nkind: List\nitmes: []", `document 1: List: unknown field "itmes"`},
		{"an item without a kind", "apiVersion: v1\nkind: List\nitems: [{}]", "document 1: items[0]: no apiVersion or no kind: not a Kubernetes object"},
		{"a stranger in a typed list", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems: [{kind: Pod}]", "document 1: items[0]: a networking.k8s.io/v1 Pod in a list of networking.k8s.io/v1 NetworkPolicy"},
		{"a policy in a List", "apiVersion: v1\nkind: List\nitems:\n- " + strings.ReplaceAll(polHdr, "\n", "\n  ") + "spec: {x: 1}", `document 1: items[0]: NetworkPolicy default/p: unknown field "spec.x"`},
		{"lists without end", deep, "document 1: items[0]: items[0]: items[0]: items[0]: lists are nested too deep"},
	} {
		if _, errs := decodeText(c.text); errs != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.rule, errs, c.want)
		}
	}
}

func TestDecodeNames(t *testing.T) {
	for _, c := range []struct {
		kind, name, namespace string
		ok                    bool
	}{
		{"Pod", "a.b-1", "shop", true},
		{"Pod", "A", "shop", false},
		{"Pod", "a/b", "shop", false},
		{"Pod", "a", "shop/x", false},
		{"Pod", "a", "shop.x", false},
		{"Pod", `a\nb`, "shop", false},
		{"Node", "n.example.org", "", true},
		{"Node", "n_1", "", false},
		{"Namespace", "shop", "", true},
		{"Namespace", "shop.x", "", false},
	} {
		_, errs := decodeText(fmt.Sprintf(`{"apiVersion":"v1","kind":%q,"metadata":{"name":"%s","namespace":%q}}`, c.kind, c.name, c.namespace))
		if (errs == "") != c.ok || strings.Contains(errs, "\n") {
			t.Errorf("%s %q in %q: want ok %t, got %q", c.kind, c.name, c.namespace, c.ok, errs)
		}
	}
}

// What the API server defaults is defaulted, and what only the compiler judges
// is handed on.
func TestDecodePolicy(t *testing.T) {
	objs, errs := decodeText(polHdr + "spec: {podSelector: {}, egress: [{ports: [{port: 90, endPort: 80}]}], ingress: [{from: [{ipBlock: {cidr: nonsense}}]}]}")
	p := objs.Policies["default/p"]
	if errs != "" || p == nil {
		t.Fatalf("policy %v, errors %q", p, errs)
	}
	if got := fmt.Sprintln(p.Namespace, p.Spec.PolicyTypes, *p.Spec.Egress[0].Ports[0].Protocol, *p.Spec.Egress[0].Ports[0].EndPort, p.Spec.Ingress[0].From[0].IPBlock.CIDR); got != "default [Ingress Egress] TCP 80 nonsense\n" {
		t.Errorf("got %s", got)
	}
}

func TestDecodeLogsWhatItPassesOver(t *testing.T) {
	var out strings.Builder
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	decode("f.yaml", []byte("apiVersion: apps/v1\nkind: Deployment\n---\n"+podA+"---\n"+podA), log)
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "level=DEBUG") || !strings.Contains(lines[0], "kind=Deployment") ||
		!strings.Contains(lines[1], "level=WARN") || !strings.Contains(lines[1], "default/a") {
		t.Errorf("want one debug line for the Deployment and a warning for the double pod, got\n%s", out.String())
	}
}
