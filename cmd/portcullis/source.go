package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"portcullis/policycache"
	"portcullis/policycache/cni"
	"portcullis/policycache/kube"
	"portcullis/policycache/manifest"
)

// clusterFlags say where the cluster's state comes from: a directory of
// manifests, or else the API server that kubectl would talk to.
type clusterFlags struct {
	manifests  string
	kubeconfig string
	context    string
}

func (c *clusterFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.manifests, "manifests", "", "directory with the cluster's manifests (YAML or JSON), instead of an API server")
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "kubeconfig of the API server (default $KUBECONFIG, then ~/.kube/config, then the pod's service account)")
	f.StringVar(&c.context, "context", "", "context of the kubeconfig (default the current one)")
}

func (c *clusterFlags) check() error {
	if c.manifests != "" && (c.kubeconfig != "" || c.context != "") {
		return fmt.Errorf("--manifests excludes --kubeconfig and --context: the state comes from one or the other")
	}
	return nil
}

func (c *clusterFlags) connect() (*kube.Client, error) {
	return kube.Connect(kube.Config{Kubeconfig: c.kubeconfig, Context: c.context, UserAgent: "portcullis/" + version})
}

// read reads the state once. It gives the namespace that questions are about
// when they name none, too.
func (c *clusterFlags) read(ctx context.Context) (*policycache.Objects, string, error) {
	if c.manifests != "" {
		objects, err := manifest.Load(c.manifests)
		return objects, metav1.NamespaceDefault, err
	}
	client, err := c.connect()
	if err != nil {
		return nil, "", err
	}
	objects, err := kube.Fetch(ctx, client)
	return objects, client.Namespace, err
}

// source is where an agent's state comes from. Its methods but run may be
// called from any goroutine.
type source interface {
	// run calls apply with the whole state, again after each change, until ctx
	// ends.
	run(ctx context.Context, apply func(*policycache.Objects)) error
	// unready says why the state isn't whole, nothing when it is.
	unready() []string
	// describe writes how the source is doing, a line each.
	describe(w io.Writer)
	// collect emits the source's metrics.
	collect(ch chan<- prometheus.Metric)
}

// open makes the source that the flags ask for. Nothing is read yet.
func (c *clusterFlags) open(log *slog.Logger) (source, error) {
	if c.manifests != "" {
		w, err := manifest.NewWatcher(c.manifests, log)
		return manifestSource{w}, err
	}
	client, err := c.connect()
	if err != nil {
		return nil, err
	}
	// client-go tells its troubles to klog, and the watcher tells those that
	// matter: the rest is detail.
	klog.SetSlogLogger(slog.New(detail{log.Handler()}))
	log.Debug("watching the API server", "host", client.Host)
	return apiSource{kube.NewWatcher(client, log)}, nil
}

// detail is a log in which everything is of the debug level.
type detail struct{ slog.Handler }

func (d detail) Enabled(ctx context.Context, _ slog.Level) bool {
	return d.Handler.Enabled(ctx, slog.LevelDebug)
}

func (d detail) Handle(ctx context.Context, r slog.Record) error {
	if !d.Enabled(ctx, r.Level) { // klog doesn't ask for errors
		return nil
	}
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

func (d detail) WithAttrs(attrs []slog.Attr) slog.Handler { return detail{d.Handler.WithAttrs(attrs)} }
func (d detail) WithGroup(name string) slog.Handler       { return detail{d.Handler.WithGroup(name)} }

// manifestSource follows a directory.
type manifestSource struct{ watcher *manifest.Watcher }

func (s manifestSource) run(ctx context.Context, apply func(*policycache.Objects)) error {
	return s.watcher.Run(ctx, apply)
}

func (s manifestSource) unready() []string {
	status := s.watcher.Status()
	if !status.Loaded {
		return []string{"state: not loaded"}
	}
	var why []string
	for _, file := range status.NeverLoaded {
		why = append(why, fmt.Sprintf("state: %s has never been read: %s", file, status.Errors[file]))
	}
	return why
}

func (s manifestSource) describe(w io.Writer) {
	status := s.watcher.Status()
	fmt.Fprintf(w, "[i] state: %d files, last change %s, loads that failed %d\n",
		status.Files, status.LastChange.UTC().Format(time.RFC3339), status.FailedLoads)
	for _, file := range slices.Sorted(maps.Keys(status.Errors)) {
		kept := "; its last good state is in force"
		if slices.Contains(status.NeverLoaded, file) {
			kept = ""
		}
		fmt.Fprintf(w, "[!] file %s: %s%s\n", file, status.Errors[file], kept)
	}
}

func (s manifestSource) collect(ch chan<- prometheus.Metric) {
	status := s.watcher.Status()
	filesWrong.emit(ch, float64(len(status.Errors)))
	failedLoads.emit(ch, float64(status.FailedLoads))
	emitTime(ch, lastChange, status.LastChange)
}

// apiSource watches an API server.
type apiSource struct{ watcher *kube.Watcher }

func (s apiSource) run(ctx context.Context, apply func(*policycache.Objects)) error {
	return s.watcher.Run(ctx, apply)
}

// unready: once the state is loaded, a server that is away doesn't make the
// agent unready. The last known state stays in force, as it should.
func (s apiSource) unready() []string {
	status := s.watcher.Status()
	if status.Loaded {
		return nil
	}
	why := []string{"state: not loaded"}
	for _, resource := range slices.Sorted(maps.Keys(status.Errors)) {
		why = append(why, fmt.Sprintf("state: %s: %s", resource, status.Errors[resource]))
	}
	return why
}

func (s apiSource) describe(w io.Writer) {
	status := s.watcher.Status()
	fmt.Fprintf(w, "[i] state: from the API server, last change %s\n", status.LastChange.UTC().Format(time.RFC3339))
	for _, resource := range kube.Resources() {
		fmt.Fprintf(w, "[i] watch of %s: heard of %s, %d errors\n", resource, ago(status.Heard[resource]), status.WatchErrors[resource])
		if text, ok := status.Errors[resource]; ok {
			fmt.Fprintf(w, "[!] watch of %s: %s; the last known state is in force\n", resource, text)
		}
	}
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

func (s apiSource) collect(ch chan<- prometheus.Metric) {
	status := s.watcher.Status()
	emitTime(ch, lastChange, status.LastChange)
	for _, resource := range kube.Resources() {
		watchErrors.emit(ch, float64(status.WatchErrors[resource]), resource)
		_, wrong := status.Errors[resource]
		watchBroken.emit(ch, boolGauge(wrong), resource)
		if heard := status.Heard[resource]; !heard.IsZero() {
			stateAge.emit(ch, time.Since(heard).Seconds(), resource)
		}
	}
}

// emitTime emits a time as Prometheus writes it, seconds since 1970, unless it
// is zero.
func emitTime(ch chan<- prometheus.Metric, f family, t time.Time) {
	if !t.IsZero() {
		f.emit(ch, float64(t.UnixMilli())/1000)
	}
}

// resultsSource adds to a source's state the addresses that the CNI plugins have
// given to the node's pods and that the source doesn't name yet.
type resultsSource struct {
	source
	results *cni.Watcher
	node    string
}

func (s resultsSource) run(ctx context.Context, apply func(*policycache.Objects)) error {
	var mu sync.Mutex // apply is called from two sides, and never twice at once
	var last *policycache.Objects
	var following sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer following.Wait()
	defer cancel()
	following.Go(func() {
		s.results.Run(ctx, func() {
			mu.Lock()
			defer mu.Unlock()
			if last != nil && ctx.Err() == nil {
				apply(s.results.Fill(last, s.node))
			}
		})
	})
	return s.source.run(ctx, func(o *policycache.Objects) {
		mu.Lock()
		defer mu.Unlock()
		last = o
		apply(s.results.Fill(o, s.node))
	})
}

func (s resultsSource) describe(w io.Writer) {
	s.source.describe(w)
	fmt.Fprintf(w, "[i] CNI results: addresses of %d pods\n", s.results.Count())
}
