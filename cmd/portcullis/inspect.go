package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"strconv"
	"sync"
	"time"

	"portcullis/filter/audit"
	"portcullis/policycache"
	"portcullis/policycache/diff"
	"portcullis/policycache/live"
	"portcullis/verdict"
)

// maxRepairs is how many of the last repairs are remembered.
const maxRepairs = 16

// inspector is what an agent tells on its Unix socket, besides what it has already
// elsewhere. Its methods may be called from any goroutine.
type inspector struct {
	tap     *audit.Tap
	started time.Time

	mu       sync.Mutex
	objects  *policycache.Objects
	snapshot *verdict.Snapshot
	applied  time.Time
	times    diff.Times
	repaired []diff.Finding
	faults   map[string]time.Time // since when each is known
}

func newInspector() *inspector {
	return &inspector{tap: audit.NewTap(), started: time.Now(), faults: map[string]time.Time{}}
}

// tapFor gives the tap, nil if there is no socket by which it could be reached.
func (i *inspector) tapFor(socket string) *audit.Tap {
	if socket == "" {
		return nil
	}
	return i.tap
}

// applyNow notes the state that is in force now.
func (i *inspector) applyNow(o *policycache.Objects, s *verdict.Snapshot) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.objects, i.snapshot, i.applied = o, s, time.Now()
	i.times.Note(o, i.applied)
}

// noteRepairs notes what was wrong in the kernel and has been put right.
func (i *inspector) noteRepairs(repaired []string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, text := range repaired {
		i.repaired = append(i.repaired, diff.Finding{Text: text, Time: time.Now()})
	}
	i.repaired = i.repaired[max(0, len(i.repaired)-maxRepairs):]
}

// current gives the state in force, nil before the first.
func (i *inspector) current() (*policycache.Objects, *verdict.Snapshot) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.objects, i.snapshot
}

// serveSocket answers on the Unix socket until the returned function is called. The gate
// doesn't depend on it: without a socket there is an error in the log, and the agent goes
// on. While another agent has it, it is waited for, as the http address is.
func (a *agent) serveSocket(ctx context.Context) (stop func()) {
	if a.options.socket == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	server := &http.Server{Handler: a.socketHandler(), ReadHeaderTimeout: 5 * time.Second}
	var socket *agentSocket
	var serving sync.WaitGroup
	serving.Go(func() {
		if socket = a.waitForSocket(ctx); socket == nil {
			return
		}
		if err := server.Serve(socket); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("the server on the socket ended", "err", err)
		}
	})
	return func() {
		cancel()
		err := server.Close()
		serving.Wait()
		if socket != nil {
			err = errors.Join(err, socket.remove())
		}
		if err != nil {
			a.log.Error("closing the socket", "err", err)
		}
	}
}

// waitForSocket listens as soon as no other agent does; nil if ctx ends before, or
// it can't be.
func (a *agent) waitForSocket(ctx context.Context) *agentSocket {
	for said := false; ; said = true {
		socket, err := listenSocket(a.options.socket)
		switch {
		case err == nil:
			return socket
		case !errors.Is(err, errSocketTaken):
			a.log.Error("no socket for observe, top, diff and pprof", "socket", a.options.socket, "err", err)
			return nil
		case !said:
			a.log.Info("another agent has the socket: waiting until it has handed over", "socket", a.options.socket)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(portLook):
		}
	}
}

func (a *agent) socketHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/decisions", a.answerDecisions)
	mux.HandleFunc("GET /v1/stats", func(w http.ResponseWriter, _ *http.Request) { answerJSON(w, a.sample()) })
	mux.HandleFunc("GET /v1/state", a.answerState)
	mux.HandleFunc("GET /v1/explain", a.answerExplain)
	mux.HandleFunc("POST /v1/explain", a.answerBatch)
	mux.HandleFunc("GET /v1/matrix", a.answerMatrix)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

func answerJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // whoever asked may have gone
}

// The header says how many of the lines that follow are from before the question.
const historyHeader = "Portcullis-History"

// answerDecisions writes the last decisions as the log's lines, and with ?follow those
// that come after them. Who reads slowly is told how many he lost.
func (a *agent) answerDecisions(w http.ResponseWriter, r *http.Request) {
	lines, subscriber := a.inspect.tap.Last(r.URL.Query().Has("follow"))
	if subscriber != nil {
		defer subscriber.Close()
	}
	w.Header().Set("Content-Type", "application/jsonl")
	w.Header().Set(historyHeader, strconv.Itoa(len(lines)))
	for _, line := range lines {
		if _, err := w.Write(line); err != nil {
			return
		}
	}
	flush := http.NewResponseController(w)
	for subscriber != nil {
		if flush.Flush() != nil {
			return
		}
		b, lost, err := subscriber.Next(r.Context())
		if err != nil {
			return
		}
		if lost > 0 {
			b = append(b, audit.MissingLine(a.options.node, time.Now(), lost)...)
		}
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// maxDenied is how many kinds of denials top is told of.
const maxDenied = 200

// sample gives the agent's figures for top.
func (a *agent) sample() *live.Sample {
	s := &live.Sample{Node: a.options.node, Started: a.inspect.started, Decisions: map[string]uint64{}}
	if snapshot := a.engine.Snapshot(); snapshot != nil {
		s.Generation = snapshot.Generation()
	}
	a.mu.Lock()
	queues := a.queues
	a.mu.Unlock()
	if queues != nil {
		fillSample(s, queues.Stats())
	}
	for _, d := range a.inspect.tap.Denied() {
		if len(s.Denied) == maxDenied {
			break
		}
		s.Denied = append(s.Denied, live.Denied{From: d.Src, To: d.Dst, Protocol: d.Protocol, Port: d.Port, Verdict: d.Verdict, Reason: d.Reason,
			Policies: d.Policies, Count: d.Count, Last: time.Unix(0, d.Last).UTC()})
	}
	s.Time = time.Now()
	return s
}

// answerState writes what the node believes and what is in its kernel.
func (a *agent) answerState(w http.ResponseWriter, _ *http.Request) {
	state, err := a.believed()
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	answerJSON(w, state)
}

var errNoState = errors.New("the agent has no state yet: it isn't ready")

func (a *agent) believed() (*diff.State, error) {
	i := a.inspect
	i.mu.Lock()
	if i.objects == nil {
		i.mu.Unlock()
		return nil, errNoState
	}
	s := &diff.State{Node: a.options.node, Generation: i.snapshot.Generation(), Applied: i.applied, Since: i.times.Since()}
	s.Put(i.objects)
	s.Repaired = append(s.Repaired, i.repaired...)
	i.mu.Unlock()
	for _, set := range a.kernel.Sets() {
		one := diff.Set{Name: set.Name, IPv6: set.IPv6, Members: set.Members}
		if set.Err != nil {
			one.Error = set.Err.Error()
		}
		s.Sets = append(s.Sets, one)
	}
	faults, err := a.kernel.Faults()
	if err != nil {
		faults = append(faults, fmt.Sprintf("the rules can't be read: %s", oneLine(err)))
	}
	s.Faults = i.sinceWhen(faults)
	s.Time = time.Now()
	return s, nil
}

// sinceWhen gives for each fault when it was first seen, and forgets those that are no
// more.
func (i *inspector) sinceWhen(faults []string) (found []diff.Finding) {
	i.mu.Lock()
	defer i.mu.Unlock()
	before := i.faults
	i.faults = map[string]time.Time{}
	for _, text := range faults {
		at, known := before[text]
		if !known {
			at = time.Now()
		}
		i.faults[text] = at
		found = append(found, diff.Finding{Text: text, Time: at})
	}
	return found
}
