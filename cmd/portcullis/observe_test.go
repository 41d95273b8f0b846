package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	tea "github.com/charmbracelet/bubbletea"

	"portcullis/policycache/live"
)

// scriptedAgent says what it is given: old lines, and then those that come.
type scriptedAgent struct {
	id, node string
	old      []string
	come     chan string // closed when the agent ends
	err      error       // instead of an answer
	mute     bool        // never answers
	asked    *[][]string // the flags it was asked with
	mu       *sync.Mutex
}

func (a *scriptedAgent) key() string  { return a.id }
func (a *scriptedAgent) name() string { return "node " + a.node }

func (a *scriptedAgent) decisions(ctx context.Context, q decisionQuery, use func([]byte, bool) error, seen func()) error {
	if a.mu != nil {
		a.mu.Lock()
		*a.asked = append(*a.asked, q.flags)
		a.mu.Unlock()
	}
	if a.mute {
		<-ctx.Done()
		return fmt.Errorf("as a library says it: %w", ctx.Err())
	}
	if a.err != nil {
		return a.err
	}
	for _, line := range a.old {
		if err := use([]byte(line), true); err != nil {
			return err
		}
	}
	seen()
	for q.follow {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case line, more := <-a.come:
			if !more {
				return errAgentEnded
			}
			if err := use([]byte(line), false); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *scriptedAgent) samples(ctx context.Context, every time.Duration, use func(*live.Sample)) error {
	if a.err != nil {
		return a.err
	}
	for i := 0; ctx.Err() == nil; i++ {
		use(&live.Sample{Node: a.node, Started: time.Unix(0, 0), Time: time.Unix(int64(100+i), 0), Decisions: map[string]uint64{"deny": uint64(100 + 7*i)},
			Denied: []live.Denied{{From: "a/x", To: "a/db", Protocol: "TCP", Port: 80, Verdict: "deny", Reason: "no-rule", Policies: "a/db", Count: uint64(100 + 7*i)}}})
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}

// decision is a line of a node at a second.
func decision(node string, second int, pod string) string {
	return fmt.Sprintf(`{"kind":"decision","time":"2026-01-01T00:00:%02dZ","node":%q,"verdict":"deny","reason":"no-rule","protocol":"TCP","src":{"ip":"10.0.0.1","kind":"pod","namespace":"a","pod":%q},"dst":{"ip":"10.0.0.2","port":80}}`, second, node, pod)
}

// observing runs observe on agents, with its output so far and what ends it.
func observing(t *testing.T, list func() []agentSource, args ...string) (out, errs *syncBuffer, ended chan error, stop func()) {
	t.Helper()
	var o observeOptions
	cmd := newObserveCmd()
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	o.follow, _ = cmd.Flags().GetBool("follow")
	o.last, _ = cmd.Flags().GetInt("last")
	o.criteria.Pod, _ = cmd.Flags().GetStringSlice("pod")
	o.criteria.Since, _ = cmd.Flags().GetString("since")
	if err := o.check(cmd.Flags()); err != nil {
		t.Fatal(err)
	}
	out, errs, ended = &syncBuffer{}, &syncBuffer{}, make(chan error, 1)
	show, err := newShow(out, "jsonpath={.node}{.src.pod}")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := &fleet{func(context.Context) ([]agentSource, error) { return list(), nil }}
	observer := newObserver(&o, f, show, newTroubles(errs))
	if !o.follow {
		observer.patience = time.Second
	}
	go func() { ended <- observer.run(ctx) }()
	return out, errs, ended, cancel
}

// syncBuffer is written by one goroutine while another reads it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// words waits until the output is these words.
func (s *syncBuffer) words(t *testing.T, want string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got := strings.Join(strings.Fields(s.String()), " ")
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

// The last decisions of all nodes are one list; a node that gives no answer is named, and
// the exit code tells.
func TestObserveLast(t *testing.T) {
	n1 := &scriptedAgent{id: "1", node: "n1", old: []string{decision("n1", 1, "a"), decision("n1", 4, "b"), decision("n1", 5, "c")}}
	n2 := &scriptedAgent{id: "2", node: "n2", old: []string{decision("n2", 2, "d"), decision("n2", 6, "e")}}
	n3 := &scriptedAgent{id: "3", node: "n3", err: errors.New("it is\naway")}
	n4 := &scriptedAgent{id: "4", node: "n4", mute: true}
	for _, row := range []struct {
		args   string
		agents []agentSource
		want   string
		errs   string
		code   int
	}{
		{"", []agentSource{n1, n2}, "n1a n2d n1b n1c n2e", "", 0},
		{"--last 3", []agentSource{n1, n2}, "n1b n1c n2e", "", 0},
		{"--last 0", []agentSource{n1, n2}, "", "", 0},
		{"--pod a/b --pod e", []agentSource{n1, n2}, "n1b n2e", "", 0},
		{"--since 2026-01-01T00:00:05Z", []agentSource{n1, n2}, "n1c n2e", "", 0},
		{"", []agentSource{n1, n3}, "n1a n1b n1c", "node n3: it is; away", 2},
		{"", []agentSource{n3}, "", "node n3: it is; away", 1},
		{"", []agentSource{n1, n4}, "n1a n1b n1c", "node n4: it gave no answer in time", 2},
		{"", []agentSource{n4}, "", "node n4: it gave no answer in time", 1},
		{"-f", []agentSource{n3}, "", "node n3: it is; away", 1},
	} {
		out, errs, ended, stop := observing(t, func() []agentSource { return row.agents }, strings.Fields(row.args)...)
		err := <-ended
		stop()
		var exit exitError
		errors.As(err, &exit)
		if err != nil && exit.code == 0 || exit.code != row.code {
			t.Errorf("%q: %v, want exit code %d", row.args, err, row.code)
		}
		out.words(t, row.want)
		errs.words(t, row.errs)
	}
}

// Decisions that come are shown in the order of their times; a node's new agent is found,
// and what it decided while nobody looked is made up for, once.
func TestObserveFollow(t *testing.T) {
	var asked [][]string
	var mu sync.Mutex
	n1 := &scriptedAgent{id: "1", node: "n1", old: []string{decision("n1", 1, "a")}, come: make(chan string, 9)}
	n2 := &scriptedAgent{id: "2", node: "n2", come: make(chan string, 9), asked: &asked, mu: &mu}
	agents := []agentSource{n1, n2}
	out, errs, ended, stop := observing(t, func() []agentSource {
		mu.Lock()
		defer mu.Unlock()
		return agents
	}, "-f")
	out.words(t, "n1a")
	n2.come <- decision("n2", 3, "late")
	n1.come <- decision("n1", 2, "early")
	out.words(t, "n1a n1early n2late")
	anew := &scriptedAgent{id: "2b", node: "n2", old: []string{decision("n2", 3, "late"), decision("n2", 4, "between")}, come: make(chan string, 9), asked: &asked, mu: &mu}
	mu.Lock()
	agents = []agentSource{n1, anew}
	mu.Unlock()
	close(n2.come)
	out.words(t, "n1a n1early n2late n2between")
	anew.come <- decision("n2", 5, "now")
	out.words(t, "n1a n1early n2late n2between n2now")
	errs.words(t, "node n2: the agent has ended node n2: answers again")
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if last := strings.Join(asked[len(asked)-1], " "); !strings.Contains(last, "--since 2026-01-01T00:00:03Z") {
		t.Errorf("the new agent was asked with %s", last)
	}
}

// What an agent's node is asked to filter is what was asked for here.
func TestObserveRemoteFlags(t *testing.T) {
	o := observeOptions{last: 7, criteria: live.Criteria{Namespace: []string{"a"}, Pod: []string{"p", "q"}, From: []string{"f"}, To: []string{"t"}, Verdict: []string{"deny"},
		Port: []string{"80"}, Policy: []string{"x"}, Since: "5m"}}
	want := "--last 7 --namespace a --pod p --pod q --from f --to t --verdict deny --port 80 --policy x --since 5m"
	if got := strings.Join(o.remote(time.Time{}), " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if err := newObserveCmd().ParseFlags(o.remote(time.Now())); err != nil {
		t.Error(err)
	}
}

func TestObserveUsageErrors(t *testing.T) {
	t.Setenv("KUBECONFIG", t.TempDir()+"/none")
	for _, row := range []struct{ args, want string }{
		{"observe --verdict maybe", `--verdict "maybe": want deny, allow, would-deny, revoked`},
		{"observe --socket /no/such/socket", "no agent's socket at /no/such/socket"},
		{"observe --socket x --kubeconfig y", "excludes"},
		{"observe --last -1", "--last -1"},
		{"observe --port http", "--port"},
		{"observe --since then", "--since"},
		{"observe -o yaml", "unknown output"},
		{"observe -o jsonpath={.a", "jsonpath"},
		{"observe --context no-such-context", "no-such-context"},
		{"observe more", "unknown command"},
		{"top --socket /no/such/socket", "no agent's socket at /no/such/socket"},
		{"top --interval 1ms", "--interval"},
		{"top --sort size", "--sort"},
		{"top --rows -1", "--rows"},
		{"top -o yaml", "unknown output"},
		{"explain --agent x --manifests y --from a --to b --port 1", "--agent excludes"},
		{"explain --agent /no/such/socket --from a --to b --port 1", "no agent's socket"},
		{"matrix --agent x --context y --port 1", "--agent excludes"},
		{"matrix --agent /no/such/socket --port 1", "no agent's socket"},
	} {
		stdout, stderr, code := runPure(strings.NewReader(""), strings.Fields(row.args)...)
		if code != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, row.want) {
			t.Errorf("portcullis %s: exit code %d, %q, %q; want one line with %q", row.args, code, stdout, stderr, row.want)
		}
	}
	for _, args := range []string{"diff --agent /no/such/socket", "diff --settle -1s", "diff -o yaml", "diff --no-such-flag", "diff more",
		"diff --all --agent x", "diff --all --manifests x", "diff --all --kubeconfig /no/such/file"} {
		stdout, stderr, code := runPure(strings.NewReader(""), strings.Fields(args)...)
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("portcullis %s: exit code %d, %q, %q; want 2 and one line", args, code, stdout, stderr)
		}
		// Of a cluster that is named, and can't be had, the name is what helps.
		if _, named, ok := strings.Cut(args, "--kubeconfig "); ok && !strings.Contains(stderr, named) {
			t.Errorf("portcullis %s doesn't name the file: %s", args, stderr)
		}
	}
}

// TestTopOnce prints the rate between two looks, and names who gives no answer.
func TestTopOnce(t *testing.T) {
	agents := []agentSource{&scriptedAgent{id: "1", node: "n1"}, &scriptedAgent{id: "3", node: "n3", err: errors.New("away")}}
	o := topOptions{interval: 100 * time.Millisecond, sort: "count", rows: 20, output: "text"}
	var out, errs bytes.Buffer
	if err := o.printOnce(t.Context(), agents, &out, newTroubles(&errs)); err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(strings.Split(out.String(), "\n")[1])
	if fields[0] != "n1" || fields[1] != "7.0" || fields[2] != "7.0" || !strings.Contains(out.String(), "107    7.0     ") || errs.String() != "node n3: away\n" {
		t.Errorf("%s%s", out.String(), errs.String())
	}
	if err := o.printOnce(t.Context(), agents[1:], &out, newTroubles(&errs)); err == nil {
		t.Error("no agent answers, and there is no error")
	}
}

// TestTopScreen runs the screen on a terminal that is made of pipes: it shows what comes,
// sorts, and quits.
func TestTopScreen(t *testing.T) {
	s := newTopScreen("count", time.Second)
	update := func(msg tea.Msg) tea.Cmd {
		m, cmd := s.Update(msg)
		s = m.(topScreen)
		return cmd
	}
	key := func(k string) tea.Cmd { return update(tea.KeyMsg{Type: tea.KeyRunes, Runes: []rune(k)}) }
	update(tea.WindowSizeMsg{Width: 60, Height: 9})
	for i := range 6 {
		update(sampleMsg{&live.Sample{Node: fmt.Sprint("n", i%2), Started: time.Unix(0, 0), Time: time.Unix(int64(100+i), 0), Decisions: map[string]uint64{"deny": 5},
			Denied: []live.Denied{{From: fmt.Sprint("a/x", i), To: "a/a-very-long-name-of-a-destination", Verdict: "deny", Count: uint64(i + 1)}}}})
	}
	update(troubleMsg("node n9: away"))
	lines := strings.Split(s.View(), "\n")
	for _, line := range lines {
		if len([]rune(line)) > 60 {
			t.Errorf("too wide: %q", line)
		}
	}
	if len(lines) != 8 || !strings.Contains(lines[0], "by count") || lines[1] != "node n9: away" || !strings.HasPrefix(lines[3], "NODE") || !strings.HasPrefix(lines[7], "COUNT") {
		t.Errorf("%q", lines)
	}
	update(tea.WindowSizeMsg{Width: 60, Height: 40})
	if top := strings.Split(s.View(), "\n")[8]; !strings.Contains(top, "a/x5") {
		t.Errorf("first: %q", top)
	}
	key("j")
	if top := strings.Split(s.View(), "\n")[8]; !strings.Contains(top, "a/x4") {
		t.Errorf("scrolled: %q", top)
	}
	key("k")
	for range 3 {
		key("s")
	}
	if s.sort != "from" || !strings.Contains(strings.Split(s.View(), "\n")[8], "a/x4") {
		t.Errorf("by %s:\n%s", s.sort, s.View())
	}
	key("S")
	if cmd := key("q"); s.sort != "last" || cmd == nil || cmd() != tea.Quit() {
		t.Errorf("by %s; q doesn't quit", s.sort)
	}
}

// The program itself ends by q, and its readers with it.
func TestTopQuits(t *testing.T) {
	o := topOptions{interval: 100 * time.Millisecond, sort: "count"}
	agents := []agentSource{&scriptedAgent{id: "1", node: "n1"}}
	in := &keys{ready: make(chan struct{})}
	var out syncBuffer
	ended := make(chan error, 1)
	go func() {
		ended <- o.watch(t.Context(), &fleet{func(context.Context) ([]agentSource, error) { return agents, nil }}, agents, in, &out)
	}()
	for end := time.Now().Add(10 * time.Second); !strings.Contains(out.String(), "a/x"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("nothing is shown: %q", out.String())
		}
	}
	close(in.ready)
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("q doesn't end it")
	}
}

// keys is a user who presses q when he is told to.
type keys struct {
	ready   chan struct{}
	pressed bool
}

func (k *keys) Read(b []byte) (int, error) {
	<-k.ready
	if k.pressed {
		select {} // and then nothing more
	}
	k.pressed = true
	return copy(b, "q"), nil
}
