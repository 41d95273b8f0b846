package policycache_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/policycache"
	"portcullis/verdict"
)

// A scenario is a txtar archive: a comment that tells the story, files of
// manifests, and a file "script" of lines. All files are applied at the start,
// but for those that the script applies itself. The script's lines are
//
//	tcp a/web b/db:5432 -> deny ingress default/db
//	apply later.yaml
//	delete networkpolicy default/db
//	node n1                               judge that node's pods only
//	problems networkpolicy a/db, pod b/x  what the last compile objected to
//	# a remark
//
// and answer.String says how a decision reads. An end is a pod or an IP address,
// an IPv6 address with a port in brackets; tcp6, udp6, sctp6 and icmp6 mean the
// pods' IPv6 addresses; "type 135" gives an ICMP type, and "truncated",
// "fragment" or "malformed" a defect.
type scene struct {
	t       *testing.T
	objects *policycache.Objects
	files   map[string][]byte
	rig     *rig
	// stale is true when objects have changed since the last compile.
	stale bool
}

func TestScenarios(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) < 20 {
		t.Fatalf("%d scenarios, error %v: expected them in testdata", len(paths), err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			newScene(t, archive).play()
		})
	}
}

// TestFixturesAreTheExamples holds the shipped examples against the policies of
// the scenarios that are told of them.
func TestFixturesAreTheExamples(t *testing.T) {
	for _, name := range []string{"test-network-policy", "access-nginx", "default-deny-ingress", "allow-all-ingress", "default-deny-egress", "allow-all-egress"} {
		shipped, err := os.ReadFile("../deploy/examples/" + name + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		archive, err := txtar.ParseFile("testdata/fixture-" + name + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		want := newScene(t, archive).objects.Policies["default/"+name]
		got, err := decode[networkingv1.NetworkPolicy](shipped)
		if err != nil || want == nil || dump(got.Spec) != dump(want.Spec) {
			t.Errorf("%s: error %v; shipped\n%s\nscenario\n%s", name, err, dump(got), dump(want))
		}
	}
}

func newScene(t *testing.T, archive *txtar.Archive) *scene {
	s := &scene{t: t, objects: policycache.NewObjects(), files: map[string][]byte{}, rig: newRig(""), stale: true}
	for _, f := range archive.Files {
		s.files[f.Name] = f.Data
	}
	for _, f := range archive.Files {
		if f.Name != "script" && !bytes.Contains(s.files["script"], []byte("apply "+f.Name+"\n")) {
			s.apply(f.Name)
		}
	}
	return s
}

// play runs the script; a line that fails doesn't stop the ones after it.
func (s *scene) play() {
	asked := 0
	for i, line := range strings.Split(string(s.files["script"]), "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		where := fmt.Sprintf("script:%d", i+1)
		switch words[0] {
		case "apply":
			s.apply(words[1])
		case "delete":
			s.delete(where, words[1], words[2])
		case "node":
			s.rig, s.stale = newRig(words[1]), true
		case "problems":
			s.problems(where, strings.TrimSpace(strings.TrimPrefix(line, "problems")))
		default:
			s.ask(where, line)
			asked++
		}
	}
	if asked == 0 {
		s.t.Error("the script asks nothing")
	}
}

// apply reads one file of manifests into a new state.
func (s *scene) apply(name string) {
	s.t.Helper()
	o := clone(s.objects, false)
	for doc := range strings.SplitSeq(string(s.files[name]), "\n---\n") {
		if err := addManifest(o, []byte(doc)); err != nil {
			s.t.Fatalf("%s: %v", name, err)
		}
	}
	s.objects, s.stale = o, true
}

func addManifest(o *policycache.Objects, doc []byte) error {
	var kind struct{ Kind string }
	if err := yaml.Unmarshal(doc, &kind); err != nil {
		return err
	}
	switch kind.Kind {
	case "Pod":
		p, err := decode[corev1.Pod](doc)
		if err == nil {
			pod := policycache.PodFrom(p)
			o.Pods[pod.Key()] = pod
		}
		return err
	case "Namespace":
		n, err := decode[corev1.Namespace](doc)
		if err == nil {
			o.Namespaces[n.Name] = policycache.NamespaceFrom(n)
		}
		return err
	case "Node":
		n, err := decode[corev1.Node](doc)
		if err == nil {
			o.Nodes[n.Name] = policycache.NodeFrom(n)
		}
		return err
	case "NetworkPolicy":
		p, err := decode[networkingv1.NetworkPolicy](doc)
		if err == nil {
			if p.Namespace == "" {
				p.Namespace = "default"
			}
			o.Policies[p.Namespace+"/"+p.Name] = p
		}
		return err
	}
	return fmt.Errorf("kind %q", kind.Kind)
}

// decode reads a manifest strictly, so that a typo doesn't tell another story.
func decode[T any](doc []byte) (*T, error) {
	out := new(T)
	return out, yaml.UnmarshalStrict(doc, out)
}

func (s *scene) delete(where, kind, key string) {
	s.t.Helper()
	o := clone(s.objects, false)
	before := len(o.Pods) + len(o.Policies) + len(o.Namespaces) + len(o.Nodes)
	switch kind {
	case "pod":
		delete(o.Pods, key)
	case "networkpolicy":
		delete(o.Policies, key)
	case "namespace":
		delete(o.Namespaces, key)
	case "node":
		delete(o.Nodes, key)
	}
	if len(o.Pods)+len(o.Policies)+len(o.Namespaces)+len(o.Nodes) == before {
		s.t.Fatalf("%s: no %s %s to delete", where, kind, key)
	}
	s.objects, s.stale = o, true
}

func (s *scene) compile() {
	if s.stale {
		s.rig.engine.Swap(s.rig.compiler.Compile(s.objects))
		s.stale = false
	}
}

// ask compares a line's answer with the engine's, cached and not, and with the
// oracle's.
func (s *scene) ask(where, line string) {
	s.t.Helper()
	question, want, ok := strings.Cut(line, "->")
	if !ok {
		s.t.Fatalf("%s: no -> in %q", where, line)
	}
	want = strings.TrimSpace(want)
	f, err := parseFlow(s.objects, strings.Fields(question))
	if err != nil {
		s.t.Fatalf("%s: %v", where, err)
	}
	s.compile()
	for range 2 {
		for _, w := range s.rig.workers {
			if got := answerOf(w.Decide(&f)); got.String() != want {
				s.t.Errorf("%s: %s\n got  %v\n      %+v", where, line, got, got)
				return
			}
		}
	}
	if by := oracle(s.objects, s.rig.node, f); by.String() != want {
		s.t.Errorf("%s: %s\n the oracle says %v", where, line, by)
	}
}

func (s *scene) problems(where, want string) {
	s.t.Helper()
	s.compile()
	var got []string
	for _, p := range s.rig.compiler.Problems() {
		got = append(got, p.Object)
	}
	slices.Sort(got)
	if got := strings.Join(slices.Compact(got), ", "); got != want {
		s.t.Errorf("%s: problems with %q, want %q: %v", where, got, want, s.rig.compiler.Problems())
	}
}

var protoWords = map[string]verdict.Protocol{
	"tcp": verdict.TCP, "udp": verdict.UDP, "sctp": verdict.SCTP, "icmp": verdict.ICMP, "gre": 47,
	"tcp6": verdict.TCP, "udp6": verdict.UDP, "sctp6": verdict.SCTP, "icmp6": verdict.ICMPv6,
}

// parseFlow reads "tcp a/web b/db:5432", "icmp6 a/web fd00::1 type 135",
// "udp a/web 10.0.0.1:53 fragment".
func parseFlow(o *policycache.Objects, words []string) (verdict.Flow, error) {
	var f verdict.Flow
	proto, ok := protoWords[words[0]]
	if !ok || len(words) < 3 {
		return f, fmt.Errorf("not a flow: %q", words)
	}
	v6 := strings.HasSuffix(words[0], "6")
	f.Proto = proto
	if proto.HasPorts() {
		f.SrcPort = 40000
	}
	dst, port := words[2], "0"
	if i := strings.LastIndex(dst, ":"); proto.HasPorts() && i >= 0 {
		dst, port = strings.Trim(dst[:i], "[]"), dst[i+1:]
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return f, err
	}
	f.DstPort = uint16(n)
	if f.Src, err = parseEnd(o, words[1], v6); err != nil {
		return f, err
	}
	if f.Dst, err = parseEnd(o, dst, v6); err != nil {
		return f, err
	}
	return f, parseExtras(&f, words[3:])
}

// parseEnd finds an address, or a pod's first address of the family.
func parseEnd(o *policycache.Objects, end string, v6 bool) (netip.Addr, error) {
	if a, err := netip.ParseAddr(end); err == nil {
		return a, nil
	}
	if p := o.Pods[end]; p != nil {
		for _, a := range p.IPs {
			if a.Is6() == v6 {
				return a, nil
			}
		}
	}
	return netip.Addr{}, fmt.Errorf("%q is no address and no pod with an address of the family", end)
}

func parseExtras(f *verdict.Flow, words []string) error {
	if len(words) == 2 && words[0] == "type" {
		n, err := strconv.ParseUint(words[1], 10, 8)
		f.ICMPType = uint8(n)
		return err
	}
	for _, r := range []verdict.Reason{verdict.ReasonTruncated, verdict.ReasonFragment, verdict.ReasonMalformed} {
		if len(words) == 1 && words[0] == r.String() {
			f.Defect = r
			return nil
		}
	}
	if len(words) > 0 {
		return fmt.Errorf("what is %q?", words)
	}
	return nil
}
