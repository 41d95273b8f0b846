package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/bench/lab"
)

// asked runs the program beside the agent and gives its output and exit code.
func (w *world) asked(args ...string) (stdout, stderr string, code int) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 3*patient)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.Fatalf("portcullis %v: %v", args, err)
	}
	return string(out), errs.String(), cmd.ProcessState.ExitCode()
}

// observe runs observe in the background until the test ends.
func (w *world) observe(args ...string) *lab.Process {
	w.Helper()
	p, err := w.lab.Run(w.Context(), lab.Node, append([]string{binary, "observe", "--socket", w.socket}, args...)...)
	w.must(err)
	return p
}

// onSocket asks the agent on its socket.
func (w *world) onSocket(path string) (string, error) {
	client := http.Client{Timeout: patient, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", w.socket)
		}}}
	response, err := client.Get("http://agent" + path)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return string(text), err
}

// TestSocket: the socket is its owner's alone, profiles are there and not on --http; it
// goes with the agent, and one that a killed agent left is replaced.
func TestSocket(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "socket", lab.Routed)
	w.start()
	info, err := os.Stat(w.socket)
	w.must(err)
	if mode := info.Mode(); mode != os.ModeSocket|0o600 {
		t.Errorf("mode %s", mode)
	}
	if text, err := w.onSocket("/debug/pprof/goroutine?debug=1"); err != nil || !strings.Contains(text, "goroutine profile") {
		t.Errorf("pprof on the socket: %v, %.200s", err, text)
	}
	if text, err := w.get("/debug/pprof/"); err == nil {
		t.Errorf("pprof on --http: %.200s", text)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(w.socket), ".p-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("%q are left over: %v", left, err)
	}
	w.must(w.agent.Signal(syscall.SIGKILL))
	<-w.agent.Done()
	if _, err := os.Stat(w.socket); err != nil {
		t.Errorf("a killed agent took its socket away: %v", err)
	}
	w.start()
	if _, err := w.onSocket("/v1/stats"); err != nil {
		t.Errorf("the stale socket wasn't replaced: %v", err)
	}
	w.must(w.stop(syscall.SIGTERM))
	if _, err := os.Stat(w.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if _, stderr, code := w.asked("observe", "--socket", w.socket); code != 1 || !strings.Contains(stderr, "no agent's socket") {
		t.Errorf("without an agent: exit code %d, %s", code, stderr)
	}
}

// TestObserve: a denial is shown at once, although its window is open for an hour and the
// log has denials only; filters, forms and the last N; and that observing goes on with the
// agent's successor.
func TestObserve(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "observe", lab.Routed)
	w.start("--decision-log-window", "1h", "--audit", "denied")
	follow := w.observe("-f", "--verdict", "deny", "--to", "a/db")
	jsonl := w.observe("-f", "-o", "json")
	path := w.observe("-f", "-o", "jsonpath={.verdict}/{.dst.pod}/{.dst.port}", "--port", "80", "--from", "web")
	w.expect("deny tcp4 b/free a/db:80\nallow tcp4 a/web a/db:80")
	w.until("the denial is shown", func() error {
		for _, want := range []string{"DENY   tcp b/free (10.1.0.13) -> a/db (10.1.0.12):80  a/db is isolated for ingress by policy a/db; no rule admits this  [" + lab.NodeName + "]"} {
			if out := follow.Output(); !strings.Contains(out, want) || strings.Contains(out, "ALLOW") || strings.Contains(out, "\x1b") {
				return fmt.Errorf("%s", out)
			}
		}
		if out := path.Output(); !strings.Contains(out, "allow/db/80\n") || strings.Contains(out, "deny") {
			return fmt.Errorf("%s", out)
		}
		for _, d := range w.parse(jsonl.Output()) {
			if d.Verdict == "allow" && d.Src.Pod == "web" && d.Count == 1 {
				return nil
			}
		}
		return fmt.Errorf("%s", jsonl.Output())
	})
	if logged := w.decisions(); len(logged) != 0 {
		t.Errorf("the log, whose windows are open, has %+v", logged)
	}
	for args, want := range map[string]int{"--last 1": 1, "--verdict allow": 1, "--policy a/db --verdict allow": 1, "--namespace nowhere": 0, "--since 1h --pod free --last 1": 1} {
		out, stderr, code := w.asked(append([]string{"observe", "--socket", w.socket}, strings.Fields(args)...)...)
		if n := strings.Count(out, "\n"); code != 0 || n != want || stderr != "" {
			t.Errorf("observe %s: exit code %d, %d lines, want %d\n%s%s", args, code, n, want, out, stderr)
		}
	}
	w.must(w.stop(syscall.SIGTERM))
	w.start("--decision-log-window", "1h")
	w.expect("deny udp4 b/free a/db:6379")
	w.until("the successor's decisions are shown", func() error {
		if out := follow.Output(); !strings.Contains(out, ":6379") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	for _, p := range []*lab.Process{follow, jsonl, path} {
		w.must(p.Signal(syscall.SIGINT))
		if err := p.Wait(patient); err != nil {
			t.Errorf("observe ends with %v: %s", err, p.Output())
		}
	}
}

// TestSlowObserver stops reading while thousands of decisions are made: the log has them
// all, and the observer is told how many it lost.
func TestSlowObserver(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "slowobserver", lab.Routed)
	w.start()
	conn, err := net.Dial("unix", w.socket)
	w.must(err)
	defer conn.Close()
	_, err = io.WriteString(conn, "GET /v1/decisions?follow=1 HTTP/1.1\r\nHost: agent\r\n\r\n")
	w.must(err)
	const rounds, each = 3, 2000
	for range rounds {
		w.flood(each)
	}
	written, lost := w.accounted()
	if written != int(w.metric("portcullis_decisions_total")) || lost != 0 {
		t.Errorf("%d written, %d lost: a slow observer cost the log something", written, lost)
	}
	w.must(conn.SetReadDeadline(time.Now().Add(patient)))
	var text strings.Builder
	b := make([]byte, 64<<10)
	for !strings.Contains(text.String(), `"kind":"missing"`) {
		n, err := conn.Read(b)
		if text.Write(b[:n]); err != nil {
			t.Fatalf("after %d bytes: %v", text.Len(), err)
		}
	}
}

// TestTop prints one table, with the one who is denied most first.
func TestTop(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "top", lab.Routed)
	w.start()
	w.expect("allow tcp4 a/web a/db:80\ndeny tcp4 a/web a/db:6379")
	w.flood(50)
	out, stderr, code := w.asked("top", "--socket", w.socket, "--interval", "200ms")
	lines := strings.Split(out, "\n")
	if code != 0 || stderr != "" || len(lines) < 6 || !strings.HasPrefix(lines[1], lab.NodeName) || strings.Join(strings.Fields(lines[3]), " ") != "COUNT RATE/S LAST FROM TO PORT BY" {
		t.Fatalf("exit code %d, %s\n%s", code, stderr, out)
	}
	if f := strings.Fields(lines[4]); len(f) != 7 || f[0] != "50" || f[3] != "b/free" || f[4] != "a/db" || f[5] != "5000/UDP" || f[6] != "a/db" {
		t.Errorf("first: %q", f)
	}
	out, _, code = w.asked("top", "--socket", w.socket, "--interval", "200ms", "--once", "-o", "json")
	var s struct {
		Node      string
		Decisions map[string]uint64
		Queues    []struct{ Number int }
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil || code != 0 || s.Node != lab.NodeName || s.Decisions["deny"] < 51 || len(s.Queues) == 0 {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

// TestExplainAgent asks the agent itself: it answers for what it judges, and says what it
// doesn't know.
func TestExplainAgent(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "explainagent", lab.Routed)
	w.apply("other.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {namespace: a, name: far, labels: {app: db}}\nspec: {nodeName: node-9}\nstatus: {phase: Running, podIP: 10.1.9.9}\n")
	w.start()
	ask := func(args string) (string, string, int) {
		return w.asked(append(strings.Fields(args), "--agent", w.socket)...)
	}
	for args, want := range map[string][]string{
		"explain --from b/free --to a/db --port 80":         {"DENY ", "none of its ingress rules admits this", "ingress rule 0 of a/db admits TCP 80, but not b/free"},
		"explain --from web --to far -n a --port 80":        {"ALLOW", "a/far runs on node node-9, whose agent judges its ingress: unknown here"},
		"explain --from a/web --to a/far --port 80 -o json": {`"notJudged": true`},
		"matrix --port 80 -n a":                             {"rows connect to columns", "neither is this node's to judge", "a/far"},
	} {
		out, stderr, code := ask(args)
		for _, text := range want {
			if !strings.Contains(out, text) || code != 0 || !strings.Contains(stderr, "note: as the agent of node "+lab.NodeName+" has it, generation ") {
				t.Errorf("%s: exit code %d, %s\n%s\nwant %q", args, code, stderr, out, text)
			}
		}
	}
	if _, stderr, code := ask("explain --from a/wbe --to a/db --port 80"); code != 1 || !strings.Contains(stderr, "did you mean a/web?") {
		t.Errorf("a misspelt pod: exit code %d, %s", code, stderr)
	}
	file := filepath.Join(t.TempDir(), "questions")
	w.must(os.WriteFile(file, []byte(`{"from":"a/web","to":"a/db","port":80}`+"\n"+`{"from":"a/no","to":"a/db","port":80}`+"\n"), 0o600))
	out, _, code := ask("explain --connections " + file)
	if code != 2 || !strings.Contains(out, `"verdict":"allow"`) || !strings.Contains(out, `{"line":2,"error":`) {
		t.Errorf("a batch: exit code %d\n%s", code, out)
	}
}

// TestDiff: nothing differs, until a policy, a pod, the set or a rule does.
func TestDiff(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "diff", lab.Routed)
	w.start()
	diff := func(dir string, args ...string) (string, int) {
		w.Helper()
		out, stderr, code := w.asked(append([]string{"diff", "--agent", w.socket, "--manifests", dir}, args...)...)
		if stderr != "" {
			w.Errorf("diff: %s", stderr)
		}
		return out, code
	}
	if out, code := diff(w.dir); code != 0 || !strings.Contains(out, "no difference\n") || !strings.Contains(out, "node "+lab.NodeName+": policy generation ") {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	other := t.TempDir()
	w.must(os.CopyFS(other, os.DirFS(w.dir)))
	w.must(lab.WriteFile(filepath.Join(other, "db.yaml"), policy("a/db", `{podSelector: {matchLabels: {app: web}}}`)))
	w.must(lab.WriteFile(filepath.Join(other, "more.yaml"), policy("b/more", `{podSelector: {}}`)))
	out, code := diff(other)
	for _, want := range []string{
		"policies    networkpolicy a/db: the node has another spec.podSelector and spec.policyTypes and spec.ingress", ", since 20", "policies    networkpolicy b/more: the node doesn't have it",
		"sets        ipset portcullis-4: 10.1.0.11 of pod a/web is missing: the pod isn't enforced", "10.1.0.12 is in it: pod a/db, which isn't isolated on this node",
	} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("exit code %d, no %q in\n%s", code, want, out)
		}
	}
	// The kernel is looked at itself, and not what the agent put there.
	w.until("a member that somebody took out is missed", func() error {
		w.command("ipset", "del", "-exist", "portcullis-4", "10.1.0.12")
		if out, code := diff(w.dir, "--settle", "0"); code != 1 || !strings.Contains(out, "10.1.0.12 of pod a/db is missing") {
			return fmt.Errorf("exit code %d\n%s", code, out)
		}
		return nil
	})
	w.until("a jump that somebody took out is missed", func() error {
		for _, l := range strings.Split(w.command("iptables", "-t", "mangle", "-S", "FORWARD"), "\n") {
			if strings.Contains(l, "PORTCULLIS") {
				w.command(append([]string{"iptables", "-t", "mangle", "-D"}, strings.Fields(l)[1:]...)...)
			}
		}
		var got struct {
			Differences []struct{ Part, What, Since string }
		}
		out, code := diff(w.dir, "--settle", "0", "-o", "json")
		if err := json.Unmarshal([]byte(out), &got); err != nil || code != 1 {
			return fmt.Errorf("exit code %d, %v\n%s", code, err, out)
		}
		for _, d := range got.Differences {
			if d.Part == "rules" && strings.Contains(d.What, "the jump from FORWARD was gone") && d.Since != "" {
				return nil
			}
		}
		return fmt.Errorf("%s", out)
	})
	w.until("the repairs are told", func() error {
		out, code := diff(w.dir)
		if code != 0 || !strings.Contains(out, "repaired    ") || !strings.Contains(out, "the jump from FORWARD was gone") {
			return fmt.Errorf("exit code %d\n%s", code, out)
		}
		return nil
	})
	w.must(w.stop(syscall.SIGTERM))
	if _, stderr, code := w.asked("diff", "--agent", w.socket, "--manifests", w.dir); code != 2 || strings.Count(stderr, "\n") != 1 {
		t.Errorf("without an agent: exit code %d, %s", code, stderr)
	}
}
