package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

// transcript runs the commands of an archive's file "transcript", which are its
// lines that begin with "$ ", among the archive's other files, and compares
// what they print and how they exit with what the transcript says; with
// UPDATE_GOLDEN set it writes it. Output is shown as it is, each line of stderr
// behind "! ", and an exit code other than 0 as "[1]".
func transcript(t *testing.T, path string) {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var script *txtar.File
	for i := range archive.Files {
		f := &archive.Files[i]
		if f.Name == "transcript" {
			script = f
			continue
		}
		name := filepath.Join(dir, f.Name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, f.Data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if script == nil {
		t.Fatalf("%s has no transcript", path)
	}
	t.Chdir(dir)
	var got bytes.Buffer
	for line := range strings.Lines(string(script.Data)) {
		if command, ok := strings.CutPrefix(line, "$ portcullis "); ok {
			got.WriteString(line)
			replay(t, &got, strings.Fields(command))
		}
	}
	if os.Getenv("UPDATE_GOLDEN") != "" {
		script.Data = got.Bytes()
		if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want := string(script.Data); got.String() != want {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", filepath.Base(path), got.String(), want)
	}
}

// replay runs one command, whose last words may be "< FILE".
func replay(t *testing.T, w *bytes.Buffer, args []string) {
	t.Helper()
	var in io.Reader = strings.NewReader("")
	if n := len(args); n > 2 && args[n-2] == "<" {
		data, err := os.ReadFile(args[n-1])
		if err != nil {
			t.Fatal(err)
		}
		in, args = bytes.NewReader(data), args[:n-2]
	}
	stdout, stderr, code := runPure(in, args...)
	w.WriteString(stdout)
	for line := range strings.Lines(stderr) {
		w.WriteString("! " + line)
	}
	if code != 0 {
		fmt.Fprintf(w, "[%d]\n", code)
	}
	w.WriteByte('\n')
}

// runPure runs a command that touches no kernel, as main does.
func runPure(in io.Reader, args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	code = run(context.Background(), args, in, &out, &errs)
	return out.String(), errs.String(), code
}

func TestExplainTranscript(t *testing.T) { transcript(t, "testdata/explain.txtar") }

// Whatever is wrong with the command line is one line on stderr, nothing on
// stdout, and exit code 1.
func TestExplainUsageErrors(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("KUBECONFIG", filepath.Join(dir, "none"))
	for _, tt := range []struct{ args, want string }{
		{"", "give --from and --to, or --connections"},
		{"--from a --to b --port 1", "no cluster is configured: give --manifests DIR"},
		{"--manifests DIR", "give --from and --to, or --connections"},
		{"--manifests DIR --from a", "give --from and --to"},
		{"--manifests DIR --from a --to b --port 1 -o yaml", `unknown output "yaml"`},
		{"--manifests DIR --from a --to b --port 1 extra", "extra"},
		{"--manifests DIR --connections=", "--connections needs a file"},
		{"--manifests DIR --connections - --from a", "--connections and --from exclude each other"},
		{"--manifests DIR --connections - --to a", "--connections and --to exclude each other"},
		{"--manifests DIR --connections - --port 1", "--connections and --port exclude each other"},
		{"--manifests DIR --connections - --protocol UDP", "--connections and --protocol exclude each other"},
		{"--manifests DIR --connections - -o text", "leave out -o text"},
		{"--manifests DIR --connections DIR/none", "opening connections: open "},
		{"--manifests DIR --connections DIR", "reading connections: read "},
		{"--manifests DIR/none --connections -", "no such file"},
		{"--manifests DIR --from a --to b", `TCP needs a port`},
		{"--manifests DIR --bogus", "unknown flag: --bogus"},
	} {
		args := strings.Fields("explain " + strings.ReplaceAll(tt.args, "DIR", dir))
		stdout, stderr, code := runPure(strings.NewReader(""), args...)
		if stdout != "" || code != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want %q", tt.args, code, stdout, stderr, tt.want)
		}
	}
}

// Errors in several files are still one line.
func TestExplainManifestErrors(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.yaml", "b.yaml"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("kind: [\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	stdout, stderr, code := runPure(nil, "explain", "--manifests", dir, "--from", "a", "--to", "b", "--port", "1")
	if stdout != "" || code != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "a.yaml") || !strings.Contains(stderr, "b.yaml") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}

// A reader that has had enough, such as head, is no error.
func TestExplainClosedPipe(t *testing.T) {
	dir := t.TempDir()
	for _, args := range []string{
		"explain --from 192.0.2.1 --to 192.0.2.2 --port 1", "explain --from 192.0.2.1 --to 192.0.2.2 --port 1 -o json",
		"explain --connections -", "matrix --port 1", "matrix --port 1 -o json",
	} {
		r, w := io.Pipe()
		r.Close()
		in := strings.NewReader(`{"from":"192.0.2.1","to":"192.0.2.2","port":1}`)
		var stderr bytes.Buffer
		if code := run(context.Background(), append(strings.Fields(args), "--manifests", dir), in, w, &stderr); code != 0 || stderr.Len() > 0 {
			t.Errorf("%s: exit %d, %s", args, code, stderr.String())
		}
	}
}
