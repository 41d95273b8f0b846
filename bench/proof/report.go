package proof

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Write puts the results into a directory: RESULTS.md (TUNING.md, if what was
// measured is what was tried) and the plots in plots.
func (r *Results) Write(dir string, m Machine) error {
	if len(r.rounds) == 0 {
		return errNoFigures
	}
	if r.Params.Variants == "tune" {
		return os.WriteFile(filepath.Join(dir, "TUNING.md"), []byte(r.tuningPage(m)), 0o644)
	}
	plots, err := r.Plot(filepath.Join(dir, "plots"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "RESULTS.md"), []byte(r.page(m, plots)), 0o644)
}

// text is Markdown in the making.
type text struct{ strings.Builder }

func (t *text) say(format string, args ...any) { fmt.Fprintf(t, format+"\n", args...) }

// table writes a table; columns after the first are figures.
func (t *text) table(head []string, rows [][]string) {
	t.say("\n| %s |", strings.Join(head, " | "))
	t.say("| --- |%s", strings.Repeat(" ---: |", len(head)-1))
	for _, row := range rows {
		t.say("| %s |", strings.Join(row, " | "))
	}
	t.say("")
}

// number writes a value with as many digits as it deserves; "–" for none.
func number(v float64) string {
	switch abs := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "–"
	case abs >= 1000:
		s := fmt.Sprintf("%.0f", v)
		for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
			s = s[:i] + "," + s[i:]
		}
		return s
	case abs >= 100:
		return fmt.Sprintf("%.0f", v)
	case abs >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// String gives the median, and the lowest and highest round's value.
func (s summary) String() string {
	if math.IsNaN(s.median) {
		return "–"
	}
	if s.low == s.high {
		return number(s.median)
	}
	return fmt.Sprintf("%s (%s–%s)", number(s.median), number(s.low), number(s.high))
}

// page is RESULTS.md.
func (r *Results) page(m Machine, plots []string) string {
	var t text
	t.say("# Results\n\nWritten by `make bench`; not edited by hand.\n")
	r.sayMachine(&t, m)
	t.say("\nEvery figure is the median of the rounds, with the lowest and the highest round's value in parentheses. Ratios are made within each round.")
	t.say("\n## Targets\n\nComputed from the figures below; met or not by the median.")
	var rows [][]string
	for _, target := range r.targets() {
		bound := "≤ "
		if target.least {
			bound = "≥ "
		}
		rows = append(rows, []string{target.what, bound + fmt.Sprint(target.bound), summarize(target.found).String(), target.verdict()})
	}
	t.table([]string{"ratio", "target", "found", "verdict"}, rows)
	r.sayVariants(&t)
	r.sayFigures(&t)
	r.sayRatios(&t)
	r.sayChanges(&t)
	r.sayBudget(&t)
	if len(plots) > 0 {
		t.say("\n## Plots\n")
	}
	for _, p := range plots {
		t.say("![%s](plots/%s)\n", strings.TrimSuffix(p, ".svg"), p)
	}
	t.say("%s", howMeasured)
	return t.String()
}

// tuningPage is TUNING.md.
func (r *Results) tuningPage(m Machine) string {
	var t text
	t.say("# What was tried on the packet's path\n\nWritten by `make bench-tune`; not edited by hand. Ratios to the bare echo are made within each round.\n")
	r.sayMachine(&t, m)
	var rows [][]string
	many := floodFigure(r.Params.Clients, 1)
	for _, v := range r.variants {
		rows = append(rows, []string{v.name, v.about, r.summary(v.name, connectP50).String(), r.summary(v.name, connectP99).String(),
			r.summary(v.name, many).String(), summarize(r.ratio(v.name, echoName, connectP50)).String(), summarize(r.ratio(v.name, echoName, many)).String()})
	}
	t.table([]string{"variant", "what", "connect p50 µs", "p99 µs", string(many), "p50 ÷ echo", "conns/s ÷ echo"}, rows)
	return t.String()
}

func (r *Results) sayMachine(t *text, m Machine) {
	t.say("%s, %d CPUs, Linux %s, %s, revision %s. Started %s, took %s. Load average before: %s.", m.CPU, m.CPUs, m.Kernel, m.Go, m.Revision,
		r.Started.UTC().Format("2006-01-02 15:04 UTC"), r.Took.Round(1e9), m.Load)
	p := r.Params
	t.say("\n%d rounds; in each, of each variant: %s connects one after the other, %s floods of connects for each number of clients and pairs, %d first datagrams, a stream for %s.",
		p.Rounds, number(float64(p.Connects)), p.Flood, p.Datagrams, p.Stream)
}

func (r *Results) sayVariants(t *text) {
	t.say("## Variants\n")
	for _, v := range r.variants {
		t.say("- `%s`: %s", v.name, v.about)
	}
}

// sayFigures writes the table of all figures.
func (r *Results) sayFigures(t *text) {
	p := r.Params
	t.say("\n## Figures")
	columns := []struct {
		head string
		what figure
	}{
		{"connect p50 µs", connectP50}, {"connect p99 µs", connectP99},
		{"conns/s, 1 client, 1 pair", floodFigure(1, 1)}, {fmt.Sprintf("1 client, %d pairs", p.Pairs), floodFigure(1, p.Pairs)},
		{fmt.Sprintf("%d clients, 1 pair", p.Clients), floodFigure(p.Clients, 1)}, {fmt.Sprintf("%d clients, %d pairs", p.Clients, p.Pairs), floodFigure(p.Clients, p.Pairs)},
		{"UDP first packet p50 µs", firstP50}, {"p99 µs", firstP99}, {"stream Gbit/s", streamRate}, {"failed", failures}, {"SYNs sent again", resent},
	}
	head := []string{"variant"}
	for _, c := range columns {
		head = append(head, c.head)
	}
	var rows [][]string
	for _, v := range r.variants {
		row := []string{"`" + v.name + "`"}
		for _, c := range columns {
			row = append(row, r.summary(v.name, c.what).String())
		}
		rows = append(rows, row)
	}
	t.table(head, rows)
}

// sayRatios writes e/c, e/a and f/e, and what deciding, logging and denying cost.
func (r *Results) sayRatios(t *text) {
	many := floodFigure(r.Params.Clients, 1)
	t.say("## Ratios")
	var rows [][]string
	for _, v := range r.variants {
		if v.kind == agentKind {
			row := []string{"`" + v.name + "`"}
			for _, what := range []figure{connectP50, many} {
				for _, under := range []string{echoName, pinnedName, none} {
					row = append(row, summarize(r.ratio(v.name, under, what)).String())
				}
			}
			rows = append(rows, row)
		}
	}
	t.table([]string{"variant", "connect p50, e/c", "e/c′", "e/a", string(many) + ", e/c", "e/c′", "e/a"}, rows)
	rows = nil
	for _, n := range r.Params.OnPod {
		e := onPodName(n)
		if len(r.rounds[e]) == 0 {
			e = agentName(n) // ten policies are ten on the pod anyway
		}
		rows = append(rows, []string{fmt.Sprint(n), summarize(r.ratio(chainsName(n), e, connectP50)).String(), summarize(r.ratio(chainsName(n), e, connectP99)).String(), summarize(r.ratio(chainsName(n), e, many)).String()})
	}
	t.table([]string{"policies on the pod", "connect p50, f/e", "p99, f/e", string(many) + ", f/e"}, rows)
	r.saySmall(t)
}

func (r *Results) saySmall(t *text) {
	first := r.Params.Policies[0]
	e := agentName(first)
	difference := func(a, b string, what figure) summary {
		return summarize(differences(valuesOf(r.rounds[a], what), valuesOf(r.rounds[b], what)))
	}
	rows := [][]string{
		{"a miss instead of a hit, connect p50 µs more", difference(missName(first), e, connectP50).String()},
		{"decision log on instead of off, connect p50 µs more", difference(logName, e, connectP50).String()},
		{"decision log on ÷ off, " + string(floodFigure(r.Params.Clients, 1)), summarize(r.ratio(logName, e, floodFigure(r.Params.Clients, 1))).String()},
		{"a denial: how much later an admitted first packet behind it gets through, p50 µs", r.summary(e, denialP50).String()},
		{"the same without cache", r.summary(missName(first), denialP50).String()},
		{"decision log's latencyNs (read to verdict), allow, p50 µs", r.summary(logName, logAllow).String()},
		{"the same, deny", r.summary(logName, logDeny).String()},
	}
	t.table([]string{"small things", "found"}, rows)
}

// sayChanges writes what changes take.
func (r *Results) sayChanges(t *text) {
	t.say("## Changes\n\nFrom before the file or the table is touched until a datagram's fate tells that the kernel enforces it. Of one policy, alone:")
	var rows [][]string
	for _, c := range r.changes {
		rows = append(rows, []string{"`" + c.Variant + "`", number(float64(c.Policies)), summarize(c.Add).String(), summarize(c.Remove).String()})
	}
	t.table([]string{"variant", "policies", "added, ms", "removed, ms"}, rows)
	t.say("Of policies added, policies removed, pods relabelled and labelled back, %d changes a second asked for:", r.Params.Rate)
	rows = nil
	for _, c := range r.reactions {
		sorted := micros(c.LatencyNs)
		p99 := percentile(sorted, 0.99) / 1e3
		verdict := "met"
		if !(p99 <= reactionTarget) || c.Failed > 0 {
			verdict = "**not met**"
		}
		rows = append(rows, []string{"`" + c.variant + "`", fmt.Sprint(len(sorted)), fmt.Sprint(c.Failed),
			number(float64(len(sorted)+c.Failed) / (float64(c.ElapsedNs) / 1e9)), number(percentile(sorted, 0.5) / 1e3), number(p99), number(percentile(sorted, 1) / 1e3), verdict,
			number(percentile(micros(c.MadeNs), 0.5) / 1e3), number(c.memory.resident), number(c.memory.peak)})
	}
	t.table([]string{"variant", "changes seen", "not seen", "per second", "p50 ms", "p99 ms", "highest ms", fmt.Sprintf("p99 ≤ %g ms", reactionTarget),
		"of that until the change was made, p50 ms", "agent's memory then, MiB", "at most until then"}, rows)
	t.say("The agents called `%s-` watch an API server, a real one with its etcd, in the node's namespace and on the same CPUs; their changes are requests to it, and count from before they are sent. The others follow a directory. Memory is what is resident of the whole process (VmRSS, VmHWM), of at most %d MiB, with %s pods.\n", apiName, residentTarget, number(float64(r.Params.Pods)))
}

// residentTarget is the most memory that the agent may have, in MiB.
const residentTarget = 128

// reactionTarget is the most that 99 of 100 changes may take, in milliseconds.
const reactionTarget = 100.0

// benchNames gives the microbenchmarks that were run, in order.
func (r *Results) benchNames() []string {
	var names []string
	for name := range r.micro {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
