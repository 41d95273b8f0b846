package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	defaultHTTP = "127.0.0.1:9353"
	// serverName and podHeader tell who answers.
	serverName = "portcullis"
	podHeader  = "Portcullis-Pod-Uid"
	// portLook is how often the port is tried while another agent has it.
	portLook = 50 * time.Millisecond
)

// serveHTTP answers /healthz, /readyz and /metrics until the returned function
// is called. A port that another agent has is waited for: it is free when that one
// has handed over.
func (a *agent) serveHTTP(ctx context.Context) (stop func(), err error) {
	if a.options.http == "" {
		return func() {}, nil
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", a.options.http)
	if err != nil && !(errors.Is(err, syscall.EADDRINUSE) && isAgent(ctx, a.options.http)) {
		return nil, fmt.Errorf("--http: %w; give another address", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: a.named(mux), ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}
	ctx, cancel := context.WithCancel(ctx)
	var serving sync.WaitGroup
	serving.Go(func() {
		if listener == nil {
			listener = a.waitForPort(ctx)
		}
		if listener == nil {
			return
		}
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("http server ended", "err", err)
		}
	})
	return func() {
		cancel()
		server.Close()
		serving.Wait()
	}, nil
}

// named says in each answer who answers.
func (a *agent) named(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", serverName)
		w.Header().Set(podHeader, a.options.podUID)
		next.ServeHTTP(w, r)
	})
}

// isAgent tells whether an agent answers at an address.
func isAgent(ctx context.Context, address string) bool {
	return probe(ctx, address, anyPod) == nil
}

// waitForPort listens as soon as the other agent doesn't any more; nil if ctx ends
// before.
func (a *agent) waitForPort(ctx context.Context) net.Listener {
	a.log.Info("another agent has the http address: waiting until it has handed over", "address", a.options.http)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(portLook):
		}
		listener, err := new(net.ListenConfig).Listen(ctx, "tcp", a.options.http)
		if err == nil {
			a.log.Info("the http address is free now", "address", a.options.http)
			return listener
		}
		if !errors.Is(err, syscall.EADDRINUSE) && ctx.Err() == nil {
			a.log.Error("http server can't start", "err", err)
			return nil
		}
	}
}

// readyz answers 200 when the agent is ready, else 503 and why. With ?verbose
// it tells how each part is doing, ready or not.
func (a *agent) readyz(w http.ResponseWriter, r *http.Request) {
	why := a.unready()
	// All is written at once, when no lock is held any more: a client that
	// reads slowly must not hold up a change of policy.
	var page bytes.Buffer
	for _, line := range why {
		fmt.Fprintf(&page, "[-] %s\n", line)
	}
	if r.URL.Query().Has("verbose") {
		a.describe(&page)
	}
	if len(why) > 0 {
		page.WriteString("not ready\n")
		w.WriteHeader(http.StatusServiceUnavailable)
	} else {
		page.WriteString("ok\n")
	}
	w.Write(page.Bytes())
}

// describe writes how each part is doing, a line each.
func (a *agent) describe(w io.Writer) {
	a.source.describe(w)
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.engine.Snapshot(); s != nil {
		fmt.Fprintf(w, "[i] policy: generation %d, %d pods, %d policies, %d addresses judged here, %d isolated\n",
			s.Generation(), a.state.pods, a.state.policies, a.state.judged, a.state.isolated)
		describeHeld(w, s)
	}
	if n := a.state.auditOnlyPods; n > 0 {
		fmt.Fprintf(w, "[!] mode: %d of %d isolated pods here are in audit-only mode, what they would deny passes\n", n, a.state.isolatedPods)
	}
	for _, p := range a.state.problems {
		fmt.Fprintf(w, "[!] %s: %s\n", p.Object, oneLine(p.Err))
	}
	a.describeRecord(w)
	a.describeEvents(w)
	if a.state.rules {
		fmt.Fprintf(w, "[i] rules: in place, backend %s\n", a.kernel.Backend())
	}
	a.spoof.describe(w)
	if a.queues != nil {
		for _, q := range a.queues.Stats() {
			fmt.Fprintf(w, "[i] queue %d: %d packets\n", q.Queue, q.Packets)
		}
	}
}
