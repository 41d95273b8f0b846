//go:build conformance

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sctpSpecs are the specs that open SCTP sockets, which not every kernel has. Those
// about SCTP in policies alone are not among them.
const sctpSpecs = "SCTPConnectivity"

// denySpecs are specs that can't pass where nobody enforces.
const denySpecs = `default-deny-ingress|default-deny-all|deny egress from pods`

// spec is one of Kubernetes' own tests, and how each of its runs went.
type spec struct {
	name    string
	states  []string // ginkgo's words: passed, failed, skipped, …
	seconds []float64
}

// TestConformance runs Kubernetes' own tests of NetworkPolicy against the DaemonSet,
// on both kinds of node network and of kube-proxy, as often as RUNS says, and writes
// the results to bench/CONFORMANCE.md. At the end the agent is uninstalled, and specs
// that deny must fail: so the tests were able to.
func TestConformance(t *testing.T) {
	runs := 1
	if s := os.Getenv("RUNS"); s != "" {
		var err error
		if runs, err = strconv.Atoi(s); err != nil || runs < 1 {
			t.Fatalf("RUNS=%s: want a number of runs", s)
		}
	}
	kinds := []kind{{"ptp", "iptables", "nft"}, {"bridge", "nftables", "nft"}}
	page := newPage(runs)
	for _, k := range kinds {
		t.Run(k.String(), func(t *testing.T) {
			c := newCluster(t, k)
			c.kubectl("apply", "-f", filepath.Join(repo, "deploy/portcullis.yaml"))
			c.rolledOut()
			specs := map[string]*spec{}
			for run := range runs {
				started := time.Now()
				passed, ran := c.runSpecs(".", specs)
				t.Logf("run %d: %d of %d passed in %s", run+1, passed, ran, time.Since(started).Round(time.Second))
				if passed != ran || ran == 0 {
					t.Errorf("run %d: %d of %d specs passed", run+1, passed, ran)
				}
			}
			c.kubectl("apply", "-f", filepath.Join(repo, "deploy/uninstall.yaml"))
			c.rolledOut()
			without := map[string]*spec{}
			passed, ran := c.runSpecs(denySpecs, without)
			if passed != 0 || ran == 0 {
				t.Errorf("without the agent %d of %d specs that deny passed: they show nothing", passed, ran)
			}
			page.add(fmt.Sprintf("%s, kube-proxy %s", k.cni, k.proxy), specs, without)
		})
	}
	if err := os.WriteFile(filepath.Join(repo, "bench/CONFORMANCE.md"), []byte(page.text(hasSCTP())), 0o644); err != nil {
		t.Fatal(err)
	}
}

// hasSCTP asks the kernel for an SCTP socket.
func hasSCTP() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// runSpecs runs the specs of NetworkPolicy whose names match, four at a time since
// they mostly wait, and adds how they went. Of those that need SCTP sockets where
// there are none it notes that they were skipped.
func (c *cluster) runSpecs(focus string, specs map[string]*spec) (passed, ran int) {
	c.Helper()
	dir := c.TempDir()
	absolute, err := filepath.Abs(repo)
	c.must(err)
	args := []string{"--net=/run/netns/pc-net", filepath.Join(absolute, ".bin/ginkgo"), "--procs=4", "--no-color",
		"--focus=Netpol.*(" + focus + ")", "--json-report=report.json", "--output-dir=" + dir}
	if !hasSCTP() {
		args = append(args, "--skip="+sctpSpecs)
	}
	args = append(args, filepath.Join(absolute, ".bin/e2e.test"), "--", "--provider=local",
		"--kubeconfig="+filepath.Join(absolute, ".cluster/pki/admin.kubeconfig"), "--host=https://172.30.99.1:6443",
		"--num-nodes=2", "--allowed-not-ready-nodes=0")
	out, runErr := exec.Command("nsenter", args...).CombinedOutput()
	reports, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err != nil {
		c.Fatalf("e2e.test: %v, %v\n%s", runErr, err, out)
	}
	results, err := parseReport(reports)
	c.must(err)
	for _, r := range results {
		s := specs[r.name]
		if s == nil {
			s = &spec{name: r.name}
			specs[r.name] = s
		}
		s.states, s.seconds = append(s.states, r.states...), append(s.seconds, r.seconds...)
		switch {
		case r.states[0] == "skipped":
			continue
		case r.states[0] == "passed":
			passed++
		default:
			c.Logf("%s %s", r.states[0], r.name)
		}
		ran++
	}
	return passed, ran
}

// parseReport reads ginkgo's JSON report: all specs of NetworkPolicy that were run,
// and those about SCTP sockets even if they weren't.
func parseReport(b []byte) (specs []spec, err error) {
	var reports []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeText, State     string
			LeafNodeType            string
			RunTime                 time.Duration
		}
	}
	if err := json.Unmarshal(b, &reports); err != nil {
		return nil, fmt.Errorf("read ginkgo's report: %w", err)
	}
	for _, report := range reports {
		for _, s := range report.SpecReports {
			name := strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
			if s.LeafNodeType != "It" || !strings.Contains(name, "Netpol") || s.State == "skipped" && !strings.Contains(name, sctpSpecs) {
				continue
			}
			specs = append(specs, spec{name, []string{s.State}, []float64{s.RunTime.Seconds()}})
		}
	}
	return specs, nil
}

// page is bench/CONFORMANCE.md in the making.
type page struct {
	runs   int
	kinds  []string
	tables []map[string]*spec
	proofs []map[string]*spec // the same without the agent
}

func newPage(runs int) *page { return &page{runs: runs} }

func (p *page) add(kind string, specs, without map[string]*spec) {
	p.kinds, p.tables, p.proofs = append(p.kinds, kind), append(p.tables, specs), append(p.proofs, without)
}

func (p *page) text(sctp bool) string {
	var b strings.Builder
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	fmt.Fprintf(&b, `# Kubernetes' own tests of NetworkPolicy

What `+"`make conformance RUNS=%d`"+` wrote on %s, kernel %s: the specs of e2e.test of
Kubernetes %s, each %d times in a row, four at a time, on clusters of two nodes with two
processors between them, dual stack, with the DaemonSet as deploy/portcullis.yaml has it.

`, p.runs, time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(uts.Release[:]), os.Getenv("K8S"), p.runs)
	for i, kind := range p.kinds {
		passed, ran := count(p.tables[i])
		denied, tried := count(p.proofs[i])
		fmt.Fprintf(&b, "- **%s: %d of %d passed.** Without the agent %d of %d that deny passed, as it has to be.\n", kind, passed, ran, denied, tried)
	}
	if !sctp {
		b.WriteString("\nThe specs under `SCTPConnectivity` can't be run here: this kernel has no SCTP sockets.\n")
	}
	fmt.Fprintf(&b, "\n| spec | %s |\n| --- |%s\n", strings.Join(p.kinds, " | "), strings.Repeat(" --- |", len(p.kinds)))
	names := map[string]bool{}
	for _, t := range p.tables {
		for name := range t {
			names[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		fmt.Fprintf(&b, "| %s |", strings.TrimPrefix(name, "[sig-network] "))
		for _, t := range p.tables {
			fmt.Fprintf(&b, " %s |", t[name].cell())
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// cell tells how the runs of a spec went: "passed 12, 13 s".
func (s *spec) cell() string {
	if s == nil {
		return "not run"
	}
	var parts []string
	for i, state := range s.states {
		switch {
		case state == "skipped":
			return "can't be run: no SCTP sockets"
		case i == 0 || state != s.states[i-1]:
			parts = append(parts, fmt.Sprintf("%s %.0f", state, s.seconds[i]))
		default:
			parts = append(parts, fmt.Sprintf("%.0f", s.seconds[i]))
		}
	}
	return strings.Join(parts, ", ") + " s"
}

// count counts runs, not specs; what was skipped wasn't run.
func count(specs map[string]*spec) (passed, ran int) {
	for _, s := range specs {
		for _, state := range s.states {
			switch state {
			case "skipped":
				continue
			case "passed":
				passed++
			}
			ran++
		}
	}
	return passed, ran
}
