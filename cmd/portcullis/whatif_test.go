package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"portcullis/filter/audit"
	"portcullis/policycache/whatif"
	"portcullis/verdict"
)

func TestReplayTranscript(t *testing.T)  { transcript(t, "testdata/replay.txtar") }
func TestSuggestTranscript(t *testing.T) { transcript(t, "testdata/suggest.txtar") }
func TestTestTranscript(t *testing.T)    { transcript(t, "testdata/test.txtar") }

// TestREADMEWhatIf holds that the README shows each what-if command, and that
// what it shows is what a transcript shows.
func TestREADMEWhatIf(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"replay", "suggest", "test"} {
		script, err := os.ReadFile("testdata/" + command + ".txtar")
		if err != nil {
			t.Fatal(err)
		}
		blocks := regexp.MustCompile("(?ms)^```\\w*\n(\\$ portcullis "+command+" .*?)^```").FindAllSubmatch(readme, -1)
		if len(blocks) == 0 {
			t.Errorf("README.md shows no example of %s", command)
		}
		for _, b := range blocks {
			if !bytes.Contains(script, b[1]) {
				t.Errorf("README.md shows what the transcript of %s doesn't:\n%s", command, b[1])
			}
		}
	}
}

// What the agent writes is what whatif reads.
func TestDecisionLogIsReadBack(t *testing.T) {
	var out bytes.Buffer
	log := audit.NewLog(audit.Config{Node: "n1", RingSize: 16, Sinks: []audit.Sink{{Name: "test", W: &out}}})
	ring := log.NewRing()
	rule := verdict.RuleRef{Policy: "shop/db", Rule: 1}
	at := time.Date(2026, 11, 25, 10, 0, 0, 5, time.UTC)
	put := func(f verdict.Flow, d verdict.Decision) {
		ring.Put(&audit.Record{Time: at.UnixNano(), Flow: f, Decision: d})
	}
	flow := verdict.Flow{Src: netip.MustParseAddr("203.0.113.1"), Dst: netip.MustParseAddr("10.0.0.2"), Proto: verdict.TCP, SrcPort: 40000, DstPort: 5432}
	put(flow, verdict.Decision{
		Verdict: verdict.Allow, Reason: verdict.ReasonRule, Dst: &verdict.Endpoint{Namespace: "shop", Name: "db-0"},
		Egress:  verdict.Side{Verdict: verdict.Allow},
		Ingress: verdict.NewSide(verdict.Allow, []string{"shop/db"}, rule),
	})
	ping := verdict.Flow{Src: flow.Dst, Dst: flow.Src, Proto: verdict.ICMP, ICMPType: 8}
	put(ping, verdict.Decision{Reason: verdict.ReasonNotReady})
	put(verdict.Flow{Defect: verdict.ReasonMalformed}, verdict.Decision{Reason: verdict.ReasonMalformed})
	ring.Put(&audit.Record{Time: at.UnixNano(), Flow: flow, Decision: verdict.Decision{Reason: verdict.ReasonNoRule}, Revoked: true})
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	// The agent's own messages may be among the records, and the word that others are
	// missing, which is counted.
	out.WriteString(`{"time":"2026-11-25T10:00:00Z","level":"INFO","msg":"enforcing","node":"n1"}` + "\n")
	out.WriteString(`{"schema":1,"kind":"missing","time":"2026-11-25T10:00:00Z","node":"n1","suppressed":3,"lost":4}` + "\n")
	var got []whatif.Record
	missing, err := whatif.Read(&out, func(r *whatif.Record) { got = append(got, *r) }, func(line int, err error) { t.Errorf("line %d: %v", line, err) })
	if err != nil || len(got) != 4 || missing != 7 {
		t.Fatal(got, missing, err)
	}
	r := &got[0]
	if !r.Time.Equal(at) || r.Verdict != "allow" || r.Reason != "rule" || len(r.Directions) != 1 || r.Directions[0] != "ingress" || r.Protocol != "TCP" ||
		r.Src.IP != "203.0.113.1" || r.Src.Pod != "" || r.Dst.Namespace != "shop" || r.Dst.Pod != "db-0" || r.Dst.Port == nil || *r.Dst.Port != 5432 || r.Count != 1 ||
		r.Egress != nil || r.Ingress == nil || !r.Ingress.Isolated || r.Ingress.Policies[0] != "shop/db" || *r.Ingress.AllowedBy != (whatif.Rule{Policy: "shop/db", Rule: 1}) {
		t.Errorf("%+v", r)
	}
	revoked := slices.IndexFunc(got, func(r whatif.Record) bool { return r.Verdict == "revoked" })
	if revoked < 0 || got[revoked].Reason != "no-rule" || got[revoked].Dst.IP != "10.0.0.2" {
		t.Errorf("%+v", got)
	}
	got = slices.Delete(got, revoked, revoked+1)
	if r := &got[1]; r.Reason != "not-ready" || r.ICMPType == nil || *r.ICMPType != 8 || r.Dst.Port != nil {
		t.Errorf("%+v", r)
	}
	if r := &got[2]; r.Src.IP != "" || r.Reason != "malformed" || len(r.Directions) != 0 {
		t.Errorf("%+v", r)
	}
}

const oneRecord = `{"verdict":"allow","reason":"not-isolated","directions":[],"protocol":"TCP","src":{"ip":"192.0.2.1"},"dst":{"ip":"192.0.2.2","port":1},"count":3}` + "\n"

// Logs may be several, and compressed whatever their names.
func TestReplayLogs(t *testing.T) {
	dir := t.TempDir()
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := io.WriteString(z, oneRecord); err != nil || z.Close() != nil {
		t.Fatal(err)
	}
	old := filepath.Join(dir, "decisions.1")
	if err := os.WriteFile(old, packed.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	torn := filepath.Join(dir, "torn")
	if err := os.WriteFile(torn, packed.Bytes()[:packed.Len()-6], 0o600); err != nil {
		t.Fatal(err)
	}
	state := mkdirAll(t, filepath.Join(dir, "state"))
	stdout, stderr, code := runPure(strings.NewReader(oneRecord), "replay", "--log", old, "--log", "-", "--manifests", state)
	if want := "6 connections: 0 would be denied, 0 would be allowed, 6 unchanged, 0 can't be judged\n"; stdout != want || stderr != "" || code != 0 {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	for _, args := range []string{"replay --log " + torn, "suggest --log " + torn, "replay --log " + dir + "/none", "suggest --log " + dir + "/none"} {
		stdout, stderr, code := runPure(nil, append(strings.Fields(args), "--manifests", state)...)
		if stdout != "" || code != 2 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, dir) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
}

func mkdirAll(t *testing.T, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A log that is none is complained of in a few lines.
func TestReplayNoLog(t *testing.T) {
	stdout, stderr, code := runPure(strings.NewReader(strings.Repeat("nonsense\n", 1000)+oneRecord), "replay", "--log", "-", "--manifests", t.TempDir())
	if code != 2 || strings.Count(stderr, "\n") != mostComplaints+1 || !strings.HasSuffix(stderr, "portcullis: lines of the log that can't be read: 1000\n") || !strings.HasPrefix(stdout, "3 connections") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}

// Whatever is wrong with the command line is one line on stderr, and exit code 2.
func TestWhatIfUsageErrors(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("KUBECONFIG", filepath.Join(dir, "none"))
	for _, tt := range []struct{ args, want string }{
		{"replay --log -", "give --manifests DIR"},
		{"replay --log - --manifests DIR -o yaml", `unknown output "yaml"`},
		{"replay --log - --manifests DIR --context x", "--manifests excludes"},
		{"replay --log - --manifests DIR --policies DIR/none", "no such file"},
		{"replay x", "unknown command"},
		{"suggest --manifests DIR", "give --log FILE"},
		{"suggest --log - --manifests DIR --ipv6-prefix -1", "--ipv6-prefix must be 0 to 128"},
		{"suggest --log - --manifests DIR --context x", "--manifests excludes"},
		{"suggest --log - --manifests DIR/none", "no such file"},
		{"suggest --bogus", "unknown flag: --bogus"},
		{"test", "requires at least 1 arg"},
		{"test x -o tap", `unknown output "tap"`},
		{"test x --coverage-min 101", "--coverage-min must be 0 to 100"},
		{"test x --coverage-min much", "invalid argument"},
	} {
		stdout, stderr, code := runPure(strings.NewReader(""), strings.Fields(strings.ReplaceAll(tt.args, "DIR", dir))...)
		if stdout != "" || code != 2 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want %q", tt.args, code, stdout, stderr, tt.want)
		}
	}
}

func TestTestWritesJUnit(t *testing.T) {
	dir := t.TempDir()
	file, report := filepath.Join(dir, "a_test.yaml"), filepath.Join(dir, "report.xml")
	const suite = "apiVersion: portcullis.dev/v1\nkind: PolicyTest\ntests: [{name: open, from: 192.0.2.1, to: 192.0.2.2, port: 1, verdict: deny}]\n"
	if err := os.WriteFile(file, []byte(suite), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := runPure(nil, "test", file, "--junit", report); code != 1 || stderr != "" {
		t.Errorf("exit %d, stderr %q", code, stderr)
	}
	text, err := os.ReadFile(report)
	if err != nil || !strings.Contains(string(text), `<testsuites tests="1" failures="1">`) || !strings.Contains(string(text), `name="open"`) {
		t.Errorf("%v: %s", err, text)
	}
	stdout, stderr, code := runPure(nil, "test", file, "--junit", filepath.Join(dir, "none", "report.xml"))
	if stdout != "" || code != 2 || !strings.Contains(stderr, "writing the JUnit report: ") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}

// A test whose manifests can't be read doesn't run, and doesn't pass.
func TestTestWithoutManifests(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a_test.yaml")
	for _, tt := range []struct{ rest, want string }{
		{"manifests: none\n", "no such file"},
		{"---\napiVersion: v1\nkind: Pod\n", "a_test.yaml: document 2: Pod: metadata.name is missing"},
	} {
		text := "apiVersion: portcullis.dev/v1\nkind: PolicyTest\ntests: [{from: 192.0.2.1, to: 192.0.2.2, port: 1, verdict: allow}]\n" + tt.rest
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		stdout, stderr, code := runPure(nil, "test", file)
		if stdout != "" || code != 2 || !strings.Contains(stderr, tt.want) {
			t.Errorf("exit %d, stdout %q, stderr %q, want %q", code, stdout, stderr, tt.want)
		}
	}
}

// A reader that has had enough, such as head, is no error.
func TestWhatIfClosedPipe(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a_test.yaml")
	if err := os.WriteFile(file, []byte("apiVersion: portcullis.dev/v1\nkind: PolicyTest\ntests: [{from: 192.0.2.1, to: 192.0.2.2, port: 1, verdict: allow}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	state := mkdirAll(t, filepath.Join(dir, "state"))
	for _, args := range []string{
		"replay --log - --manifests " + state, "replay --log - -o json --manifests " + state, "suggest --log - --manifests " + state,
		"test --coverage " + file, "test -o json " + file,
	} {
		r, w := io.Pipe()
		r.Close()
		var stderr bytes.Buffer
		if code := run(context.Background(), strings.Fields(args), strings.NewReader(oneRecord), w, &stderr); code != 0 || stderr.Len() > 0 {
			t.Errorf("%s: exit %d, %s", args, code, stderr.String())
		}
	}
}

// As a kubectl plugin the binary says how kubectl calls it.
func TestCalledAs(t *testing.T) {
	for path, want := range map[string]string{
		"portcullis": "portcullis", "/usr/bin/portcullis-v2": "portcullis", "": "portcullis",
		"kubectl-portcullis": "kubectl portcullis", "/usr/bin/kubectl-portcullis": "kubectl portcullis",
	} {
		if got := calledAs(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	for _, args := range []string{"--help", "explain --help", "replay --help"} {
		var stdout, stderr bytes.Buffer
		code := runAs(context.Background(), "kubectl portcullis", strings.Fields(args), nil, &stdout, &stderr)
		for line := range strings.Lines(stdout.String()) {
			if strings.HasPrefix(line, "  portcullis ") {
				t.Errorf("%s: %q", args, line)
			}
		}
		if code != 0 || !strings.Contains(stdout.String(), "Usage:\n  kubectl portcullis ") {
			t.Errorf("%s: exit %d\n%s", args, code, stdout.String())
		}
	}
	var stderr bytes.Buffer
	if code := runAs(context.Background(), "kubectl portcullis", []string{"explain"}, nil, io.Discard, &stderr); code != 1 || stderr.String() != "kubectl portcullis: give --from and --to, or --connections\n" {
		t.Errorf("exit %d, %q", code, stderr.String())
	}
}

// What suggest writes is a file that replay takes, and by which nothing that was
// allowed would be denied.
func TestSuggestThenReplay(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/suggest.txtar")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, f := range archive.Files {
		mkdirAll(t, filepath.Dir(filepath.Join(dir, f.Name)))
		if err := os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	stdout, stderr, code := runPure(nil, "suggest", "--log", "decisions.jsonl", "--manifests", "cluster")
	if code != 0 {
		t.Fatalf("exit %d, %s", code, stderr)
	}
	if err := os.WriteFile("suggested.yaml", []byte(stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code = runPure(nil, "replay", "--log", "decisions.jsonl", "--manifests", "cluster", "--policies", "suggested.yaml")
	if code != 0 || stderr != "" || !strings.HasPrefix(stdout, "10 connections: 0 would be denied, 0 would be allowed, 9 unchanged") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}
