package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/pflag"
	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

// TestWrongCommandLines holds that a mistake is told in one line on stderr that
// names it, with exit code 1, before anything is touched.
func TestWrongCommandLines(t *testing.T) {
	for _, row := range []struct{ args, want string }{
		{"agent", "--node is missing"},
		{"agent --node n --kubeconfig no/such/file", "no/such/file"},
		{"agent --node n --manifests d --kubeconfig f", "excludes"},
		{"explain --manifests d --context c --from a --to b --port 1", "excludes"},
		{"explain --kubeconfig no/such/file --from a --to b --port 1", "no/such/file"},
		{"matrix --kubeconfig no/such/file --port 1", "no/such/file"},
		{"agent --manifests d", "--node is missing"},
		{"agent --manifests d --node n --queues 0", "at least one queue"},
		{"agent --manifests d --node n --queue-burst 0", "--queue-burst 0 is not within 1 to 256"},
		{"agent --manifests d --node n --noisy-rate -1", "--noisy-rate -1 is not within"},
		{"agent --manifests d --node n --hold 2h", "--hold 2h0m0s is not within"},
		{"agent --manifests d --node n --unknown-pod maybe", "want allow or deny"},
		{"agent --manifests d --node n --pod-cidr nonsense", "is not a range"},
		{"agent --manifests d --node n --queue-base 65525 --queues 2", "not within 0 to 65527"},
		{"agent --manifests d --node n --queue-base -1", "not within 0 to 65527"},
		{"agent --manifests d --node n --mark-bits 0x1000", "--mark-bits"},
		{"agent --manifests d --node n --mark-bits seven", "--mark-bits"},
		{"agent --manifests d --node n --http nonsense", "not an address"},
		{"agent --manifests d --node n --log-format xml", "text or json"},
		{"agent --manifests d --node n --decision-log-ring 0", "--decision-log-ring"},
		{"agent --manifests d --node n --decision-log a --decision-log b", "at most"},
		{"agent --manifests d --node n --decision-log - --decision-log -", "at most"},
		{"agent --manifests d --node n --decision-log-window -1s", "--decision-log-window"},
		{"agent --manifests d --node n --decision-log-window 10", "--decision-log-window"},
		{"agent --manifests d --node n --decision-log-max-size -1", "--decision-log-max-size"},
		{"agent --manifests d --node n --decision-log-max-files -1", "--decision-log-max-files"},
		{"agent --manifests d --node n --audit some", "all, denied or none"},
		{"agent --manifests d --node n --audit=", "all, denied or none"},
		{"agent --manifests d --node n --audit-sample 0", "--audit-sample"},
		{"agent --manifests d --node n --audit-rate -1", "--audit-rate"},
		{"agent --manifests d --node n --cache-size -1", "below zero"},
		{"agent --manifests d --node n --iptables-backend ebtables", "ebtables"},
		{"agent --manifests d --node n more", "unknown command"},
		{"agent --no-such-flag", "unknown flag"},
		{"cleanup --mark-bits 0", "--mark-bits"},
		{"no-such-command", "unknown command"},
	} {
		t.Setenv("NODE_NAME", "")
		var stdout, stderr bytes.Buffer
		code := run(context.Background(), strings.Fields(row.args), strings.NewReader(""), &stdout, &stderr)
		line := stderr.String()
		if code != 1 || !strings.Contains(line, row.want) || strings.Count(line, "\n") != 1 || stdout.Len() > 0 {
			t.Errorf("portcullis %s: exit code %d, stderr %q, stdout %q; want one line with %q", row.args, code, line, stdout.String(), row.want)
		}
	}
}

func TestVersion(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(context.Background(), []string{"version"}, nil, &stdout, &stderr); code != 0 || !strings.HasPrefix(stdout.String(), "portcullis ") {
		t.Errorf("version: exit code %d, %q, %q", code, stdout.String(), stderr.String())
	}
}

func TestOneLine(t *testing.T) {
	if got := oneLine(errors.Join(errors.New("a\nb"), errors.New("c"))); got != "a; b; c" {
		t.Errorf("oneLine: %q", got)
	}
	if got := oneLine(errors.New("pod \x1b[31m\u009b\u202eé\t")); got != `pod \x1b[31m\u009b\u202eé\t` {
		t.Errorf("oneLine: %q", got)
	}
}

// TestOutlivesItsReaders holds that a decision log on standard output whose
// reader goes away, or a closed standard error, doesn't end the process. The
// test runs itself as that process, since only descriptors 1 and 2 are special.
func TestOutlivesItsReaders(t *testing.T) {
	const child = "PORTCULLIS_TEST_WRITES_TO_NOBODY"
	if os.Getenv(child) != "" {
		defer outlivePipes()()
		_, first := os.Stdout.WriteString("a line\n")
		_, second := os.Stderr.WriteString("a line\n")
		if !errors.Is(first, syscall.EPIPE) || !errors.Is(second, syscall.EPIPE) {
			os.Exit(3)
		}
		os.Exit(42)
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	reader.Close()
	defer writer.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestOutlivesItsReaders$")
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.Stdout, cmd.Stderr = writer, writer
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 42 {
		t.Errorf("writing where nobody reads: %v, want exit status 42", err)
	}
}

// TestManifestsArguments holds that what the manifests run is what this program
// takes.
func TestManifestsArguments(t *testing.T) {
	t.Setenv("NODE_NAME", "some-node")
	tried := 0
	for _, file := range []string{"portcullis.yaml", "uninstall.yaml"} {
		text, err := os.ReadFile(filepath.Join("../../deploy", file))
		if err != nil {
			t.Fatal(err)
		}
		_, object, _ := strings.Cut(string(text), "\nkind: DaemonSet\n")
		var ds appsv1.DaemonSet
		if err := yaml.Unmarshal([]byte("kind: DaemonSet\n"+object), &ds); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		pod := ds.Spec.Template.Spec
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			tried++
			cmd, rest, err := newRootCmd().Find(c.Args)
			if err == nil {
				err = cmd.ParseFlags(rest)
			}
			if err != nil || cmd.Flags().NArg() > 0 {
				t.Errorf("%s runs portcullis %s: %v", file, strings.Join(c.Args, " "), err)
			}
		}
	}
	if tried != 3 {
		t.Errorf("%d containers found, want 3", tried)
	}
}

// TestREADMEIsComplete holds that the README names every flag of the agent.
func TestREADMEIsComplete(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	newAgentCmd().Flags().VisitAll(func(f *pflag.Flag) { names = append(names, "--"+f.Name) })
	if len(names) < 25 {
		t.Errorf("only %d flags found: %q", len(names), names)
	}
	for _, name := range names {
		if !regexp.MustCompile(regexp.QuoteMeta(name) + `\b`).Match(readme) {
			t.Errorf("README.md doesn't name %s", name)
		}
	}
}
