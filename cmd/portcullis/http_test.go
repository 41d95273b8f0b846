package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"portcullis/filter"
	"portcullis/policycache"
	"portcullis/verdict"
)

// fakeSource is a state that is there, or isn't for the reasons given.
type fakeSource struct{ why []string }

func (fakeSource) run(context.Context, func(*policycache.Objects)) error { return nil }
func (s fakeSource) unready() []string                                   { return s.why }
func (fakeSource) describe(w io.Writer)                                  { io.WriteString(w, "[i] state: a fake\n") }
func (fakeSource) collect(chan<- prometheus.Metric)                      {}

// watchfulWriter is a client that looks, while it is written to, whether the
// agent's lock is free.
type watchfulWriter struct {
	*httptest.ResponseRecorder
	agent *agent
	held  bool
}

func (w *watchfulWriter) Write(b []byte) (int, error) {
	if w.agent.mu.TryLock() {
		w.agent.mu.Unlock()
	} else {
		w.held = true
	}
	return w.ResponseRecorder.Write(b)
}

// TestReadyz holds that readiness is the sum of the parts, and that a client
// that reads slowly holds up nobody.
func TestReadyz(t *testing.T) {
	for _, c := range []struct {
		name   string
		source []string
		change func(*agentState)
		want   string
	}{
		{"nothing yet", []string{"state: not loaded"}, func(s *agentState) { *s = agentState{} }, "state: not loaded"},
		{"not compiled", nil, func(s *agentState) { s.compiled = false }, "policy: not compiled"},
		{"no queues", nil, func(*agentState) {}, "queues: not bound"},
		{"no rules", nil, func(s *agentState) { s.rules = false }, "rules: not in place"},
		{"sets", nil, func(s *agentState) { s.sets = errors.New("full") }, "sets: full"},
		{"bridges", nil, func(s *agentState) { s.bridges = errors.New("off") }, "bridges: off"},
		{"open connections", nil, func(*agentState) {}, "open connections: not judged yet"},
		{"repair", nil, func(s *agentState) { s.repair = errors.New("two\nlines") }, "rules: two; lines"},
	} {
		a := &agent{source: fakeSource{c.source}, engine: verdict.NewEngine(), revoker: filter.NewRevoker(filter.RevokeConfig{})}
		a.state = agentState{compiled: true}
		c.change(&a.state)
		for _, path := range []string{"/readyz", "/readyz?verbose"} {
			a.state.problems = []policycache.Problem{{Object: "networkpolicy a/b", Err: errors.New("wrong")}}
			w := &watchfulWriter{ResponseRecorder: httptest.NewRecorder(), agent: a}
			a.readyz(w, httptest.NewRequest(http.MethodGet, path, nil))
			body := w.Body.String()
			if w.Code != http.StatusServiceUnavailable || !strings.Contains(body, "[-] "+c.want+"\n") || !strings.HasSuffix(body, "not ready\n") {
				t.Errorf("%s, %s: %d %s", c.name, path, w.Code, body)
			}
			if strings.Contains(path, "verbose") != strings.Contains(body, "[!] networkpolicy a/b: wrong") {
				t.Errorf("%s, %s: %s", c.name, path, body)
			}
			if w.held {
				t.Errorf("%s, %s: written under the agent's lock", c.name, path)
			}
		}
	}
}
