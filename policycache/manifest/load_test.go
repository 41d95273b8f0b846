package manifest

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

// write puts a file into dir, whole and at once, as a careful writer does.
func write(t *testing.T, dir, name, text string) {
	t.Helper()
	temporary := filepath.Join(dir, ".new-"+name)
	if err := os.WriteFile(temporary, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, target, link string) {
	t.Helper()
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func pod(name, label string) string {
	return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + ", labels: {v: \"" + label + "\"}}\n"
}

// captureDefaultLog gives what slog's default logger says until the test ends.
func captureDefaultLog(t *testing.T) *bytes.Buffer {
	var out bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&out, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return &out
}

func TestLoadPicksFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.yaml", "b.yml", "c.json", ".hidden.yaml", "d.yaml~", "e.txt", "yaml", "F.YAML"} {
		write(t, dir, name, pod(strings.ToLower(strings.Trim(name, ".~")), "x"))
	}
	write(t, mkdir(t, filepath.Join(dir, "below.yaml")), "g.yaml", pod("g", "x"))
	objs, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := keys(objs); got != "ns default, pod default/a.yaml, pod default/b.yml, pod default/c.json" {
		t.Errorf("got %s", got)
	}
}

func TestLoadOneFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "state", pod("a", "x"))
	objs, err := Load(filepath.Join(dir, "state"))
	if err != nil || keys(objs) != "ns default, pod default/a" {
		t.Errorf("got %v, error %v", objs, err)
	}
}

func TestLoadEmptyAndMissing(t *testing.T) {
	dir := t.TempDir()
	objs, err := Load(dir)
	if err != nil || keys(objs) != "" {
		t.Errorf("an empty directory: %v, error %v", objs, err)
	}
	if _, err = Load(filepath.Join(dir, "nowhere")); err == nil || !strings.Contains(err.Error(), "nowhere: no such file") {
		t.Errorf("a missing directory: error %v", err)
	}
}

func TestLoadErrorsNameFileDocumentAndField(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", podA+"---\n"+polHdr+"spec: {ingres: []}\n---\n"+polHdr+"spec: {egres: []}\n")
	write(t, dir, "b.yaml", podB)
	write(t, dir, "c.yaml", "kind: [")
	symlink(t, "nowhere.yaml", filepath.Join(dir, "d.yaml"))
	_, err := Load(dir)
	if err == nil {
		t.Fatal("no error")
	}
	want := []string{
		`a.yaml: document 2: NetworkPolicy default/p: unknown field "spec.ingres"`,
		`a.yaml: document 3: NetworkPolicy default/p: unknown field "spec.egres"`,
		`c.yaml: document 1: yaml: line 1: did not find expected node content`,
		`d.yaml: can't be read: no such file or directory`,
	}
	if err.Error() != strings.Join(want, "\n") {
		t.Errorf("got\n%v\nwant\n%s", err, strings.Join(want, "\n"))
	}
}

// A ConfigMap is mounted as links to ..data/NAME, where ..data is a link to a
// directory that is replaced as a whole.
func TestLoadConfigMapMount(t *testing.T) {
	dir := t.TempDir()
	write(t, mkdir(t, filepath.Join(dir, "..2026_01_01")), "a.yaml", podA)
	symlink(t, "..2026_01_01", filepath.Join(dir, "..data"))
	symlink(t, "..data/a.yaml", filepath.Join(dir, "a.yaml"))
	objs, err := Load(dir)
	if err != nil || keys(objs) != "ns default, pod default/a" {
		t.Errorf("got %v, error %v", objs, err)
	}
}

func TestLoadLaterFileWins(t *testing.T) {
	out := captureDefaultLog(t)
	dir := t.TempDir()
	write(t, dir, "b.yaml", pod("a", "second"))
	write(t, dir, "a.yaml", pod("a", "first"))
	objs, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := objs.Pods["default/a"].Labels["v"]; got != "second" {
		t.Errorf("the pod is of the %s file", got)
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "pod default/a is in a.yaml and in b.yaml: the one in b.yaml counts") {
		t.Errorf("want one warning, got %q", got)
	}
}

func TestLoadNamespaces(t *testing.T) {
	dir := t.TempDir()
	const label = "kubernetes.io/metadata.name"
	write(t, dir, "a.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: given, labels: {"+label+": kube-system, team: t}}\n---\n"+
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: given}\n---\n"+
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: of-pod}\n---\n"+
		"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: of-policy}\n")
	objs, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, labels := range map[string]int{"given": 2, "of-pod": 1, "of-policy": 1} {
		ns := objs.Namespaces[name]
		if ns == nil || ns.Labels[label] != name || len(ns.Labels) != labels {
			t.Errorf("namespace %s: %+v, want %d labels and its own name in %s", name, ns, labels, label)
		}
	}
	if len(objs.Namespaces) != 3 {
		t.Errorf("%d namespaces, want 3", len(objs.Namespaces))
	}
}

// The shipped examples load strictly, each as the one policy its file is named
// after, and say what they say in Kubernetes' own documentation.
func TestExamples(t *testing.T) {
	for name, want := range map[string]string{
		"test-network-policy": `{"podSelector":{"matchLabels":{"role":"db"}},"policyTypes":["Ingress","Egress"],
			"ingress":[{"from":[{"ipBlock":{"cidr":"172.17.0.0/16","except":["172.17.1.0/24"]}},{"namespaceSelector":{"matchLabels":{"project":"myproject"}}},{"podSelector":{"matchLabels":{"role":"frontend"}}}],"ports":[{"protocol":"TCP","port":6379}]}],
			"egress":[{"to":[{"ipBlock":{"cidr":"10.0.0.0/24"}}],"ports":[{"protocol":"TCP","port":5978}]}]}`,
		"access-nginx":         `{"podSelector":{"matchLabels":{"run":"nginx"}},"policyTypes":["Ingress"],"ingress":[{"from":[{"podSelector":{"matchLabels":{"access":"true"}}}]}]}`,
		"default-deny-ingress": `{"podSelector":{},"policyTypes":["Ingress"]}`,
		"allow-all-ingress":    `{"podSelector":{},"policyTypes":["Ingress"],"ingress":[{}]}`,
		"default-deny-egress":  `{"podSelector":{},"policyTypes":["Egress"]}`,
		"allow-all-egress":     `{"podSelector":{},"policyTypes":["Egress"],"egress":[{}]}`,
	} {
		objs, err := Load("../../deploy/examples/" + name + ".yaml")
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		if got := keys(objs); got != "ns default, policy default/"+name {
			t.Errorf("%s: holds %s", name, got)
			continue
		}
		var spec networkingv1.NetworkPolicySpec
		if err := yaml.UnmarshalStrict([]byte(want), &spec); err != nil {
			t.Fatal(err)
		}
		got, err := yaml.Marshal(objs.Policies["default/"+name].Spec)
		if err != nil {
			t.Fatal(err)
		}
		wanted, err := yaml.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, wanted) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, got, wanted)
		}
	}
	objs, err := Load("../../deploy/examples")
	if err != nil || len(objs.Policies) != 6 {
		t.Errorf("the directory: %v, error %v, want 6 policies", objs, err)
	}
}

// Directories and files add up, and the content at hand counts last.
func TestLoadWith(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	write(t, one, "a.yaml", pod("a", "1")+"---\n"+pod("b", "1"))
	write(t, two, "b.yaml", pod("b", "2")+"---\napiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {own: labels}}\n")
	o, err := LoadWith([]string{one, filepath.Join(two, "b.yaml")}, "c.yaml", []byte(pod("c", "3")+"---\n"+pod("a", "3")))
	if err != nil {
		t.Fatal(err)
	}
	if got := labelled(o); got != "a=3 b=2 c=3" || o.Namespaces["default"].Labels["own"] != "labels" {
		t.Errorf("got %s, namespace %+v", got, o.Namespaces["default"])
	}
	_, err = LoadWith([]string{filepath.Join(one, "none")}, "c.yaml", []byte("kind: Pod"))
	if err == nil || !strings.Contains(err.Error(), "no such file") || !strings.Contains(err.Error(), "c.yaml: document 1: no apiVersion") {
		t.Error(err)
	}
}
