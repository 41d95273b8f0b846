package proof

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// invented gives results of two rounds, the second of which took twice as long in
// all, with a Portcullis that takes extra times what the echo takes beyond
// conntrack.
func invented(t *testing.T, extra float64) *Results {
	t.Helper()
	p, err := ParamsFromEnv()
	if err != nil {
		t.Fatal(err)
	}
	p.Rounds = 2
	r := &Results{Params: p, variants: proofVariants(p), rounds: map[string][]found{}, connects: map[string][]float64{}, micro: map[string]float64{"ParsePacket": 30}}
	for _, v := range r.variants {
		base := map[kind]float64{noFilter: 40, conntrackOnly: 50, bareEcho: 70, callbackEcho: 120, agentKind: 50 + 20*extra, chainsKind: 100}[v.kind]
		for round := 1.0; round <= 2; round++ {
			f := found{connectP50: base * round, connectP99: 2 * base * round, streamRate: 10 / round, firstP50: base, firstP99: base}
			for _, clients := range []int{1, p.Clients} {
				for _, pairs := range []int{1, p.Pairs} {
					f[floodFigure(clients, pairs)] = 1e6 / base / round
				}
			}
			r.rounds[v.name] = append(r.rounds[v.name], f)
			r.connects[v.name] = append(r.connects[v.name], base*round, base*round*1.1)
		}
		if v.kind == agentKind || v.kind == chainsKind {
			r.changes = append(r.changes, change{Variant: v.name, Kind: v.kind, Policies: v.policies(), Add: []float64{1, 2}, Remove: []float64{3}})
		}
	}
	r.reactions = []reactionOf{{agentName(p.Policies[0]), reaction{LatencyNs: []int64{2e6, 5e6}, ElapsedNs: int64(time.Second)}, memory{100, 120}}}
	r.stages, r.staged = stages{Arrive: []int64{9000}, Handle: []int64{40}, Write: []int64{20_000}}, []float64{70}
	return r
}

func verdicts(r *Results) map[string]string {
	found := map[string]string{}
	for _, target := range r.targets() {
		found[target.what] = target.verdict()
	}
	return found
}

func TestTargetsAreComputed(t *testing.T) {
	p50 := "connect p50 over (b): portcullis-10 ÷ (c)"
	if got := verdicts(invented(t, 1.2))[p50]; got != "met" {
		t.Errorf("1.2 times the echo's: %s", got)
	}
	slow := verdicts(invented(t, 1.3))
	if got := slow[p50]; got != "**not met**" {
		t.Errorf("1.3 times the echo's: %s", got)
	}
	if got := slow["flat, connect p50: portcullis-10000 ÷ portcullis-10"]; got != "met" {
		t.Errorf("flat: %s", got)
	}
	r := invented(t, 1)
	delete(r.rounds, agentName(10))
	if got := verdicts(r)[p50]; got != "not measured" {
		t.Errorf("of what wasn't measured: %s", got)
	}
}

func TestWriteResults(t *testing.T) {
	dir := t.TempDir()
	if err := invented(t, 1.1).Write(dir, Machine{CPU: "a CPU", CPUs: 2, Kernel: "6.0"}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "RESULTS.md"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, want := range []string{"a CPU, 2 CPUs, Linux 6.0", "| ≤ 1.25 | 1.10 | met |", "## Budget", "| `ParsePacket` | 30.0 |", "f/e"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q in the page", want)
		}
	}
	for _, bad := range []string{"NaN", "Inf", "%!"} {
		if strings.Contains(page, bad) {
			t.Errorf("%q in the page:\n%s", bad, page)
		}
	}
	for _, name := range []string{latencyPlot, changePlot, cdfPlot} {
		b, err := os.ReadFile(filepath.Join(dir, "plots", name))
		if err != nil || !strings.Contains(string(b), "<svg") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNumbers(t *testing.T) {
	for v, want := range map[float64]string{0.123: "0.12", 12.34: "12.3", 123.4: "123", 1234: "1,234", 1234567: "1,234,567", -1234: "-1,234", -123456: "-123,456"} {
		if got := number(v); got != want {
			t.Errorf("%v: %s, want %s", v, got, want)
		}
	}
}
