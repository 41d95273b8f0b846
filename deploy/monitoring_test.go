package deploy

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const monitoring = "kustomize/components/monitoring/"

// prometheusRule is a PrometheusRule of the Prometheus operator, as far as it is
// ours to write.
type prometheusRule struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   map[string]string `json:"metadata"`
	Spec       struct {
		Groups any `json:"groups"`
	} `json:"spec"`
}

// TestRulesAreFresh: the operator's rules are those that Prometheus reads.
func TestRulesAreFresh(t *testing.T) {
	var alerts struct {
		Groups any `json:"groups"`
	}
	text, err := os.ReadFile(monitoring + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(text, &alerts); err != nil {
		t.Fatal(err)
	}
	rule := prometheusRule{APIVersion: "monitoring.coreos.com/v1", Kind: "PrometheusRule", Metadata: map[string]string{"name": "portcullis", "namespace": "portcullis"}}
	rule.Spec.Groups = alerts.Groups
	want, err := yaml.Marshal(rule)
	if err != nil {
		t.Fatal(err)
	}
	want = append([]byte("# Made of alerts.yaml by make manifests.\n"), want...)
	const file = monitoring + "prometheusrule.yaml"
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s isn't what alerts.yaml gives (%v): run make manifests", file, err)
	}
}

// TestMonitoringBuilds: with both components the base has the rules, the dashboard,
// and agents that can be scraped.
func TestMonitoringBuilds(t *testing.T) {
	text := string(build(t, "kustomize/overlays/monitoring"))
	for _, want := range []string{"kind: PrometheusRule\n", "kind: PodMonitor\n", "grafana_dashboard: \"1\"", "portcullis.json: |", "- --http=:9353\n", "name: metrics\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in what kustomize builds", want)
		}
	}
	for doc := range strings.SplitSeq(text, "\n---\n") {
		if strings.Contains(doc, "kind: Namespace\n") || strings.Contains(doc, "kind: Cluster") {
			continue
		}
		if !strings.Contains(doc+"\n", "\n  namespace: portcullis\n") {
			t.Errorf("in no namespace:\n%.300s", doc)
		}
	}
}

// TestDashboardIsWhole: panels have their own numbers and places, and every query
// goes to the data source that the viewer has chosen.
func TestDashboardIsWhole(t *testing.T) {
	text, err := os.ReadFile(monitoring + "grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	type source struct{ Type, UID string }
	var dashboard struct {
		UID    string
		Panels []struct {
			ID      int
			Title   string
			Type    string
			GridPos struct{ H, W, X, Y int }
			Targets []struct {
				RefID      string
				Expr       string
				Datasource source
			}
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	ids, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q isn't the only one of its number, or has no title", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" || x > 23 {
					t.Fatalf("%q and %q are in one place", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%q shows nothing", p.Title)
		}
		for _, q := range p.Targets {
			if !reflect.DeepEqual(q.Datasource, source{"prometheus", "${datasource}"}) || !strings.Contains(q.Expr, `instance=~"$instance"`) {
				t.Errorf("%q asks %+v for %s", p.Title, q.Datasource, q.Expr)
			}
		}
	}
	if dashboard.UID == "" || len(dashboard.Panels) < 20 {
		t.Errorf("uid %q, %d panels", dashboard.UID, len(dashboard.Panels))
	}
}
