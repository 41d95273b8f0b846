//go:build prometheus

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"portcullis/bench/lab"
)

const (
	monitoring     = "../../deploy/kustomize/components/monitoring/"
	prometheusAddr = "127.0.0.1:9090"
)

// fromAPIServer are the metrics that an agent has only if its state comes from an
// API server, which these tests have none of: nothing else may show no data.
var fromAPIServer = regexp.MustCompile(`portcullis_(state_age_seconds|watch_errors_total|watch_broken|events_total)\b`)

// TestPrometheus scrapes a real agent with a real Prometheus, once with classic
// buckets and once with native ones, and asks it everything that the dashboard and
// the alerts ask: each expression must be understood and find something.
func TestPrometheus(t *testing.T) {
	for _, kind := range []struct{ name, flag string }{
		{"classic", ""}, {"native", "--enable-feature=native-histograms"},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			w := gateWorld(t, "prom-"+kind.name, lab.Routed)
			w.start("--record", "all")
			w.prometheus(kind.flag)
			w.scraped(6)
			for _, q := range dashboardQueries(t) {
				w.finds(q.where, strings.NewReplacer("$instance", ".*", "$__rate_interval", "30s").Replace(q.expr))
			}
			for _, a := range alertQueries(t) {
				// What an alert compares must be there; that it isn't firing is as it
				// should be.
				for _, part := range regexp.MustCompile(`\s+(?:>|==|and)\s+`).Split(strings.ReplaceAll(a.expr, " offset 1h", ""), -1) {
					part = strings.TrimPrefix(part, "5 * ")
					if _, err := strconv.ParseFloat(part, 64); err != nil {
						w.finds(a.where, part)
					}
				}
			}
			w.alertsAreQuiet(len(alertQueries(t)))
			w.hasHistogram(kind.name)
			if kind.name == "classic" {
				w.linted()
			}
		})
	}
}

// prometheus runs in the node's namespace beside the agent.
func (w *world) prometheus(flag string) {
	w.Helper()
	dir := w.TempDir()
	alerts, err := filepath.Abs(monitoring + "alerts.yaml")
	w.must(err)
	config := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n"+
		"- {job_name: portcullis, static_configs: [{targets: [%q]}]}\n", alerts, httpAddr)
	w.must(os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o644))
	argv := []string{"prometheus", "--config.file=" + filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path=" + filepath.Join(dir, "data"),
		"--web.listen-address=" + prometheusAddr, "--log.level=warn"}
	if flag != "" {
		argv = append(argv, flag)
	}
	p, err := w.lab.Run(context.Background(), lab.Node, argv...)
	if err != nil {
		w.Fatalf("run Prometheus, which make test-metrics installs: %v", err)
	}
	w.Cleanup(func() {
		if w.Failed() {
			w.Logf("Prometheus said:\n%s", p.Output())
		}
	})
}

// scraped makes connections of every sort until Prometheus has seen the agent so
// many times.
func (w *world) scraped(times int) {
	w.Helper()
	w.untilWithin(60*time.Second, "Prometheus has scraped the agent", func() error {
		w.expect("allow tcp4 a/web a/db:80\nallow udp4 a/web a/db:80\ndeny tcp4 b/free a/db:80\nallow tcp4 a/web b/free:80")
		found, err := w.query("count_over_time(portcullis_ready[5m])")
		if err != nil {
			return err
		}
		if len(found) != 1 || found[0].value() < float64(times) {
			return fmt.Errorf("scraped: %+v", found)
		}
		return nil
	})
}

type sample struct {
	Metric map[string]string
	Value  [2]any
}

func (s sample) value() float64 {
	text, _ := s.Value[1].(string)
	n, _ := strconv.ParseFloat(text, 64)
	return n
}

// query asks Prometheus.
func (w *world) query(expr string) ([]sample, error) {
	w.Helper()
	var answer struct {
		Status, Error string
		Data          struct{ Result []sample }
	}
	err := w.ask("/api/v1/query?"+url.Values{"query": {expr}}.Encode(), &answer)
	if err == nil && answer.Status != "success" {
		err = fmt.Errorf("%s: %s", answer.Status, answer.Error)
	}
	return answer.Data.Result, err
}

func (w *world) ask(path string, into any) error {
	w.Helper()
	response, err := w.lab.HTTPClient(lab.Node).Get("http://" + prometheusAddr + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// finds holds that an expression is understood and finds something.
func (w *world) finds(where, expr string) {
	w.Helper()
	found, err := w.query(expr)
	switch {
	case err != nil:
		w.Errorf("%s: %s: %v", where, expr, err)
	case len(found) == 0 && !fromAPIServer.MatchString(expr):
		w.Errorf("%s: %s finds nothing", where, expr)
	}
}

// asked is an expression and whose it is.
type asked struct{ where, expr string }

func dashboardQueries(t *testing.T) (all []asked) {
	t.Helper()
	text, err := os.ReadFile(monitoring + "grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, p := range dashboard.Panels {
		for _, q := range p.Targets {
			all = append(all, asked{"panel " + p.Title, q.Expr})
		}
	}
	if len(all) < 30 {
		t.Fatalf("only %d expressions found", len(all))
	}
	return all
}

func alertQueries(t *testing.T) (all []asked) {
	t.Helper()
	text, err := os.ReadFile(monitoring + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			all = append(all, asked{"alert " + r.Alert, r.Expr})
		}
	}
	return all
}

// alertsAreQuiet: Prometheus evaluates all alerts without an error, and none fires.
func (w *world) alertsAreQuiet(want int) {
	w.Helper()
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, State, Health, LastError string }
			}
		}
	}
	w.must(w.ask("/api/v1/rules?type=alert", &answer))
	n := 0
	for _, g := range answer.Data.Groups {
		for _, r := range g.Rules {
			n++
			if r.Health != "ok" || r.State == "firing" {
				w.Errorf("alert %s is %s, %s %s", r.Name, r.State, r.Health, r.LastError)
			}
		}
	}
	if n != want {
		w.Errorf("%d alerts, want %d", n, want)
	}
}

// hasHistogram: the histograms are there in the kind of buckets that was asked for,
// and all decisions are in them.
func (w *world) hasHistogram(kind string) {
	w.Helper()
	count := "portcullis_verdict_latency_seconds_count"
	if kind == "native" {
		count = "histogram_count(portcullis_verdict_latency_seconds)"
		w.finds("native buckets", "histogram_quantile(0.5, portcullis_compile_duration_seconds) > 0")
		w.finds("native buckets", "histogram_quantile(0.5, portcullis_verdict_latency_seconds) > 0")
	} else {
		w.finds("classic buckets", "histogram_quantile(0.5, portcullis_verdict_latency_seconds_bucket) > 0")
	}
	// Both are of one scrape, but for what was decided while it was answered.
	w.until("the histogram has each decision", func() error {
		found, err := w.query("abs(scalar(sum(" + count + ")) - sum(portcullis_decisions_total))")
		if err == nil && (len(found) != 1 || found[0].value() != 0) {
			err = fmt.Errorf("apart by %+v", found)
		}
		return err
	})
}

// linted has promtool look at the names and types, and holds that an agent shows
// nothing but what README's table has.
func (w *world) linted() {
	w.Helper()
	text, err := w.get("/metrics")
	w.must(err)
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Errorf("promtool check metrics: %v\n%s", err, out)
	}
	readme, err := os.ReadFile("../../README.md")
	w.must(err)
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (portcullis_\w+) `).FindAllStringSubmatch(text, -1) {
		if !bytes.Contains(readme, []byte("`"+m[1]+"`")) && !bytes.Contains(readme, []byte("`"+strings.TrimPrefix(m[1], "portcullis")+"`")) {
			w.Errorf("README.md doesn't know %s", m[1])
		}
	}
}
