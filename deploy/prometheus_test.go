//go:build prometheus

package deploy

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestPrometheusRules has promtool read the alerts, and run their unit tests.
func TestPrometheusRules(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = monitoring
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestPrometheusRulesAreTested: each alert has a test in which it fires, and one in
// which it doesn't.
func TestPrometheusRulesAreTested(t *testing.T) {
	alerts, err := os.ReadFile(monitoring + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(monitoring + "alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`- alert: (\w+)`).FindAllSubmatch(alerts, -1)
	if len(names) < 10 {
		t.Fatalf("only %d alerts found", len(names))
	}
	for _, m := range names {
		fires := regexp.MustCompile(`alertname: ` + string(m[1]) + `\n +exp_alerts:\n +- exp_labels`)
		quiet := regexp.MustCompile(`\{eval_time: \w+, alertname: ` + string(m[1]) + `\}`)
		if !fires.Match(tests) || !quiet.Match(tests) {
			t.Errorf("%s isn't tested both ways", m[1])
		}
	}
}
