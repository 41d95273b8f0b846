package explain

import (
	"log/slog"
	"maps"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/policycache"
)

// isolating is the test cluster with one policy for db in place of its own, in which
// the text stands for the ingress rules; with a second one for web's egress if asked.
func isolating(t *testing.T, selector, ingress, egress string) *Cluster {
	t.Helper()
	c := testCluster(t)
	o := *c.objects
	o.Policies = map[string]*networkingv1.NetworkPolicy{}
	texts := map[string]string{"shop/p": `{podSelector: ` + selector + `, policyTypes: [Ingress], ingress: ` + ingress + `}`}
	if egress != "" {
		texts["default/out"] = `{podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: ` + egress + `}`
	}
	for key, spec := range texts {
		p := new(networkingv1.NetworkPolicy)
		if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		p.Namespace, p.Name, _ = strings.Cut(key, "/")
		o.Policies[key] = p
	}
	return New(&o, policycache.NewCompiler("", slog.New(slog.DiscardHandler)).Compile(&o), "")
}

// TestChanges has a row for each way in which a connection comes to be denied, with
// what is said to be missing and where what is added.
func TestChanges(t *testing.T) {
	const db = "{matchLabels: {app: db}}"
	for _, row := range []struct {
		name, selector, ingress, egress, query string
		want                                   []string // "direction why | field of policy | YAML | note"
	}{
		{"no rule", db, "[]", "", "tcp web shop/db 80", []string{
			`ingress shop/p has no ingress rule at all | spec.ingress of shop/p | [{"from":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"default"}},"podSelector":{"matchLabels":{"app":"web"}}}],"ports":[{"port":80,"protocol":"TCP"}]}] | `}},
		{"another peer", db, "[{from: [{podSelector: {}}], ports: [{port: 80}]}]", "", "tcp web shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits TCP 80, but not default/web: it has no peer that names namespace default | spec.ingress[0].from of shop/p | ` +
				`{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"default"}},"podSelector":{"matchLabels":{"app":"web"}}} | `}},
		{"other labels", db, "[{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: x}}}], ports: [{port: 80}]}]", "", "tcp shop/api shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits TCP 80, but not shop/api: it has a peer for namespace shop, but no podSelector that matches the labels app=api | ` +
				`spec.ingress[0].from of shop/p | {"podSelector":{"matchLabels":{"app":"api"}}} | `}},
		{"an exception", db, "[{from: [{ipBlock: {cidr: 203.0.0.0/8, except: [203.0.113.0/24]}}], ports: [{port: 80}]}]", "", "tcp 203.0.113.9 shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits TCP 80, but not 203.0.113.9: its ipBlock 203.0.0.0/8 leaves out 203.0.113.0/24, which holds 203.0.113.9 | ` +
				`spec.ingress[0].from of shop/p | {"ipBlock":{"cidr":"203.0.113.9/32"}} | `}},
		{"no block", db, "[{from: [{podSelector: {}}], ports: [{port: 80}]}]", "", "tcp 203.0.113.9 shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits TCP 80, but not 203.0.113.9: it has no ipBlock that holds 203.0.113.9 | spec.ingress[0].from of shop/p | {"ipBlock":{"cidr":"203.0.113.9/32"}} | `}},
		{"another port", db, "[{from: [{podSelector: {}}], ports: [{port: 80}]}]", "", "tcp shop/api shop/db 81", []string{
			`ingress ingress rule 0 of shop/p admits shop/api, but not TCP 81 | spec.ingress[0].ports of shop/p | {"port":81,"protocol":"TCP"} | all whom the rule's peer names are admitted there`}},
		{"a name that isn't there", db, "[{from: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: http}]}]", "", "tcp shop/api shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits shop/api, but not TCP 80: shop/db has no TCP port named http | spec.ingress[0].ports of shop/p | {"port":80,"protocol":"TCP"} | the rule's other peers are admitted there too`}},
		{"a name of another number", db, "[{from: [{podSelector: {}}], ports: [{port: postgres}]}]", "", "tcp shop/api shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits shop/api, but not TCP 80: its port postgres is 5432 of shop/db | spec.ingress[0].ports of shop/p | {"port":80,"protocol":"TCP"} | all whom the rule's peer names are admitted there`}},
		{"more ports than asked", db, "[{from: [{podSelector: {}}]}]", "", "tcp web shop/db 80", []string{
			`ingress ingress rule 0 of shop/p admits TCP 80, but not default/web: it has no peer that names namespace default | spec.ingress of shop/p | ` +
				`{"from":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"default"}},"podSelector":{"matchLabels":{"app":"web"}}}],"ports":[{"port":80,"protocol":"TCP"}]} | `}},
		{"everybody's rule isn't given a port", db, "[{ports: [{port: 80}]}]", "", "tcp shop/api shop/db 81", []string{
			`ingress ingress rule 0 of shop/p admits shop/api, but not TCP 81 | spec.ingress of shop/p | {"from":[{"podSelector":{"matchLabels":{"app":"api"}}}],"ports":[{"port":81,"protocol":"TCP"}]} | `}},
		{"a protocol without ports", db, "[{from: [{podSelector: {}}], ports: [{port: 80}]}]", "", "icmp shop/api shop/db -", []string{
			`ingress ingress rule 0 of shop/p admits shop/api, but not ICMP | spec.ingress of shop/p | {"from":[{"podSelector":{"matchLabels":{"app":"api"}}}]} | only a rule without ports admits ICMP: it admits every port too`}},
		{"both ways", db, "[]", "[]", "tcp web shop/db 80", []string{
			`egress default/out has no egress rule at all | spec.egress of default/out | [{"ports":[{"port":80,"protocol":"TCP"}],"to":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"shop"}},"podSelector":{"matchLabels":{"app":"db"}}}]}] | `,
			`ingress shop/p has no ingress rule at all | spec.ingress of shop/p | [{"from":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"default"}},"podSelector":{"matchLabels":{"app":"web"}}}],"ports":[{"port":80,"protocol":"TCP"}]}] | `}},
		{"a policy for all", "{}", "[{from: [{podSelector: {}}], ports: [{port: 80}]}]", "", "udp web shop/db 53", []string{
			`ingress no ingress rule of shop/p admits default/web, nor UDP 53 |  of shop/allow-to-db | new | `}},
		{"a mistake", db, "[{from: [{podSelector: {}}], ports: [{port: 80}, {port: 90, endPort: 80}]}]", "", "tcp shop/api shop/db 81", []string{
			`ingress ingress rule 0 of shop/p admits shop/api, but not TCP 81 | spec.ingress of shop/p | {"from":[{"podSelector":{"matchLabels":{"app":"api"}}}],"ports":[{"port":81,"protocol":"TCP"}]} | `}},
		{"nothing is denied", db, "[{}]", "", "tcp web shop/db 80", nil},
	} {
		c := isolating(t, row.selector, row.ingress, row.egress)
		a, err := c.Ask(query(row.query))
		if err != nil {
			t.Fatal(err)
		}
		changes := c.Changes(&a)
		var got []string
		for _, ch := range changes {
			value, err := yaml.Marshal(ch.Value)
			if err != nil {
				t.Fatal(err)
			}
			text, err := yaml.YAMLToJSON(value)
			if err != nil {
				t.Fatal(err)
			}
			if ch.New {
				text = []byte("new")
			}
			got = append(got, ch.Direction+" "+ch.Why+" | "+ch.field()+" of "+ch.Policy+" | "+string(text)+" | "+ch.Note)
		}
		if strings.Join(got, "\n") != strings.Join(row.want, "\n") {
			t.Errorf("%s:\n got %s\nwant %s", row.name, strings.Join(got, "\n     "), strings.Join(row.want, "\n     "))
		}
		o := *c.objects
		o.Policies = maps.Clone(o.Policies)
		for _, ch := range changes {
			o.Policies[ch.Policy] = ch.Changed
		}
		after := New(&o, policycache.NewCompiler("", slog.New(slog.DiscardHandler)).Compile(&o), "")
		if a, err := after.Ask(query(row.query)); err != nil || a.Decision.Verdict.String() != "allow" {
			t.Errorf("%s: still %v, %v", row.name, a.Decision, err)
		}
	}
}
