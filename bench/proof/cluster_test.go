package proof

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/bench/lab"
	"portcullis/policycache"
	"portcullis/policycache/manifest"
	"portcullis/verdict"
)

// decide compiles a directory of manifests and judges a datagram or connection
// from the first client.
func decide(t *testing.T, dir string, to netip.Addr, proto verdict.Protocol, port uint16) *verdict.Decision {
	t.Helper()
	objects, err := manifest.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := policycache.NewCompiler(lab.NodeName, slog.New(slog.NewTextHandler(io.Discard, nil))).Compile(objects)
	d := s.Decide(&verdict.Flow{Src: firstClient, Dst: to, Proto: proto, SrcPort: 40000, DstPort: port})
	return &d
}

// What is measured is what its name says: admitted by the last of the policies on
// the pod, denied elsewhere, whatever else is in the cluster.
func TestClusterAdmitsClientsByItsLastPolicy(t *testing.T) {
	dir := t.TempDir()
	if err := (clusterSpec{onPod: 10, elsewhere: 40, pods: 30}).write(dir, 3); err != nil {
		t.Fatal(err)
	}
	server := addrs(firstServer, 3)[2]
	d := decide(t, dir, server, verdict.TCP, connectPort)
	if d.Verdict != verdict.Allow || d.Ingress.AllowedBy().Policy != measured+"/"+policyName(9) || len(d.Ingress.Policies()) != 10 {
		t.Errorf("%s by %v of %v", d.Verdict, d.Ingress.AllowedBy(), d.Ingress.Policies())
	}
	for _, c := range []struct {
		proto verdict.Protocol
		port  uint16
		want  verdict.Verdict
	}{{verdict.TCP, sinkPort, verdict.Allow}, {verdict.UDP, connectPort, verdict.Allow}, {verdict.UDP, changePort, verdict.Deny}, {verdict.UDP, deniedPort, verdict.Deny}} {
		if d := decide(t, dir, server, c.proto, c.port); d.Verdict != c.want {
			t.Errorf("%s %d: %s, want %s", c.proto, c.port, d.Verdict, c.want)
		}
	}
}

// Each step of a series of changes turns the fate of datagrams to changePort.
func TestChangeStepsChangeTheVerdict(t *testing.T) {
	dir := t.TempDir()
	if err := (clusterSpec{onPod: 2}).write(dir, 2); err != nil {
		t.Fatal(err)
	}
	if err := writeManifests(filepath.Join(dir, "open.json"), changePolicy("open", openLabel)); err != nil {
		t.Fatal(err)
	}
	for turn, step := range append(changeSteps, changeSteps...) {
		if err := step.make(fileChanges(dir), 1); err != nil {
			t.Fatal(err)
		}
		for server, ip := range addrs(firstServer, 2) {
			want := server == 1 && step.admitted
			if d := decide(t, dir, ip, verdict.UDP, changePort); (d.Verdict == verdict.Allow) != want {
				t.Errorf("turn %d, server %d: %s", turn, server, d.Verdict)
			}
		}
	}
}

func TestChainsHoldEveryPolicy(t *testing.T) {
	c := chainSet{spec: clusterSpec{onPod: 5}, servers: addrs(firstServer, 3), clients: addrs(firstClient, 3)}
	rules := c.rules()
	for what, want := range map[string]int{
		"-j KUBE-NWPLCY-":                        3 * 5,       // each pod through each policy
		"\n-A KUBE-NWPLCY-":                      2 * (4 + 3), // mark and return; the last policy has three ports
		"\n:KUBE-POD-FW-":                        3,
		"-j REJECT":                              3,
		fmt.Sprintf("--dport %d -j", changePort): 0,
	} {
		if got := strings.Count(rules, what); got != want {
			t.Errorf("%q: %d, want %d", what, got, want)
		}
	}
	c.changed = true
	if rules := c.rules(); strings.Count(rules, "-j KUBE-NWPLCY-") != 3*6 || !strings.Contains(rules, fmt.Sprintf("--dport %d -j", changePort)) {
		t.Error("the change isn't in the rules")
	}
	for line := range strings.Lines(rules) {
		if name, ok := strings.CutPrefix(line, ":"); ok && len(strings.Fields(name)[0]) > 28 {
			t.Errorf("longer than iptables takes: %s", line)
		}
	}
	if sets := c.sets(); strings.Count(sets, "create KUBE-") != 12 || strings.Count(sets, "swap") != 12 || strings.Count(sets, "destroy") != 1 {
		t.Errorf("sets:\n%s", sets)
	}
}
