package demo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// showing is one run of `portcullis demo` as a process.
type showing struct {
	*testing.T
	cmd    *exec.Cmd
	tmp    string
	stderr bytes.Buffer
}

// show prepares a run. Its temporary files go into a directory of the test.
func show(t *testing.T, args ...string) *showing {
	t.Helper()
	s := &showing{T: t, tmp: t.TempDir(), cmd: exec.Command(binary, append([]string{"demo"}, args...)...)}
	s.cmd.Args[0] = "portcullis"
	s.cmd.Env = append(os.Environ(), "TMPDIR="+s.tmp)
	s.cmd.Stderr = &s.stderr
	return s
}

// left lists what the run left behind: namespaces, files, processes.
func (s *showing) left() (all []string) {
	s.Helper()
	pid := s.cmd.Process.Pid
	for _, pattern := range []string{fmt.Sprintf("/run/netns/pcl%d-*", pid), s.tmp + "/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			s.Fatal(err)
		}
		all = append(all, found...)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		s.Fatal(err)
	}
	for _, path := range commands {
		// A process that ends meanwhile has no command line to read.
		if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(s.tmp)) {
			all = append(all, string(text))
		}
	}
	return all
}

// ended checks how a run ended: its exit code, one line on stderr that has the
// words (or nothing, if there are none), and that nothing is left.
func (s *showing) ended(code int, words string) {
	s.Helper()
	if got := s.cmd.ProcessState.ExitCode(); got != code {
		s.Errorf("exit code %d, want %d", got, code)
	}
	said := s.stderr.String()
	if words == "" && said != "" || words != "" && (strings.Count(said, "\n") != 1 || !strings.Contains(said, words)) {
		s.Errorf("stderr %q, want %q", said, words)
	}
	if left := s.left(); len(left) > 0 {
		s.Errorf("left behind: %q", left)
	}
}

var timing = regexp.MustCompile(`(?m)^\d+ decisions; half of them took at most \S+ `)

// TestStory runs the whole demo: what people see is in a golden file, with the
// truth of every step in it.
func TestStory(t *testing.T) {
	t.Parallel()
	s := show(t)
	out, err := s.cmd.Output()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	s.ended(0, "")
	if !timing.Match(out) {
		t.Error("the summary doesn't say how long verdicts took")
	}
	out = timing.ReplaceAll(out, []byte("N decisions; half of them took at most T "))
	for line := range strings.Lines(string(out)) {
		if n := len(strings.TrimRight(line, "\n")); n > 100 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	golden(t, "testdata/story.golden", out)
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	wants, gots := strings.Split(string(want), "\n"), strings.Split(string(got), "\n")
	for i := range max(len(wants), len(gots)) {
		if i >= len(wants) || i >= len(gots) || wants[i] != gots[i] {
			t.Fatalf("line %d is not that of %s (-update writes it anew); all of it:\n%s", i+1, path, got)
		}
	}
}

func TestBridgedAndKept(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kept")
	s := show(t, "--mode", "bridged", "--keep", dir, "-v")
	out, err := s.cmd.Output()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	s.ended(0, "")
	for _, want := range []string{"480 connections, 0 differences", "10.22.0.30", "What the agent had to say", "explain --manifests " + dir} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	explain := exec.Command(binary, "explain", "--manifests", dir, "--from", "shop/frontend", "--to", "shop/api", "--port", "http")
	if out, err := explain.Output(); err != nil || !strings.HasPrefix(string(out), "ALLOW") {
		t.Errorf("explain by the kept manifests: %v, %s", err, out)
	}
}

// begin starts a run and waits until it has written a line that starts so.
func (s *showing) begin(line string) (rest *bufio.Scanner, closeOutput func() error) {
	s.Helper()
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), line) {
			return lines, out.Close
		}
	}
	s.Fatalf("no line %q; stderr %s", line, &s.stderr)
	return nil, nil
}

func TestInterrupted(t *testing.T) {
	for _, tt := range []struct {
		sig  syscall.Signal
		line string
	}{
		{syscall.SIGINT, "A shop"}, {syscall.SIGTERM, "1. "}, {syscall.SIGHUP, "What the decision log"},
	} {
		t.Run(tt.sig.String(), func(t *testing.T) {
			t.Parallel()
			s := show(t)
			rest, _ := s.begin(tt.line)
			if err := s.cmd.Process.Signal(tt.sig); err != nil {
				t.Fatal(err)
			}
			for rest.Scan() { // until its end closes the pipe
			}
			if err := s.cmd.Wait(); err == nil {
				t.Error("no error")
			}
			s.ended(1, "portcullis: interrupted")
		})
	}
}

func TestReaderGoesAway(t *testing.T) {
	t.Parallel()
	s := show(t)
	_, closeOutput := s.begin("0. ")
	if err := closeOutput(); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &s.stderr)
	}
	s.ended(0, "")
}

func TestWhatIsMissing(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "mine.yaml"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, words string
		uid         uint32
		env         string
		args        []string
	}{
		{"not root", "the demo needs root", 65534, "", nil},
		{"no iptables", "make demo, which installs what Debian lacks", 0, "PATH=/nowhere", nil},
		{"directory in use", "is not empty", 0, "", []string{"--keep", full}},
		{"directory is a file", "not a directory", 0, "", []string{"--keep", full + "/mine.yaml"}},
		{"no such mode", `not "tunnelled"`, 0, "", []string{"--mode", "tunnelled"}},
		{"arguments", "unknown command", 0, "", []string{"now"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := show(t, tt.args...)
			s.cmd.Env = append(s.cmd.Env, tt.env)
			s.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.uid}}
			if out, err := s.cmd.Output(); err == nil || len(out) > 0 {
				t.Errorf("err %v, wrote %s", err, out)
			}
			s.ended(1, tt.words)
		})
	}
}

// TestUnenforced runs a story with an agent that enforces nothing: a demo that
// can't fail would prove nothing.
func TestUnenforced(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	err = Run(context.Background(), &out, Options{Binary: self, story: story[:2]})
	if !errors.Is(err, ErrDiffer) {
		t.Errorf("error %v, want %v", err, ErrDiffer)
	}
	for _, want := range []string{
		"DIFFERENCE frontend -> api:8080 udp over IPv6: really connects, but explain says deny",
		"(and 42 more)",
		"2 steps, 120 connections, 50 differences",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
}

func TestAgentThatEnds(t *testing.T) {
	var out strings.Builder
	err := Run(context.Background(), &out, Options{Binary: "/bin/false"})
	if err == nil || err.Error() != "the agent can't work here: it ended without a word" {
		t.Errorf("error %v", err)
	}
}
