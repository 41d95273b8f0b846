package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"portcullis/policycache"
)

// Watcher follows the API server with shared informers: a streamed list where
// the server has it (WatchList), pages otherwise, and a watch from there on,
// begun again with growing, jittered pauses when it breaks. While the server
// is away the last known state stays; on its return what was missed,
// deletions included, shows in the new list.
type Watcher struct {
	client *Client
	log    *slog.Logger
	synced []cache.InformerSynced
	// changed holds a token while there is a change that apply hasn't seen.
	changed chan struct{}

	mu       sync.Mutex
	state    state
	status   Status
	failedAt map[string]time.Time // when Status.Errors' entries came
}

// Status is how a Watcher is doing.
type Status struct {
	// Loaded tells that the first whole state has been applied.
	Loaded bool
	// Errors has, by resource, what is wrong with its list or watch now.
	Errors map[string]string
	// WatchErrors counts what went wrong, by resource.
	WatchErrors map[string]uint64
	// Heard is when the server last said anything, by resource: an event, or a
	// bookmark, which comes about every minute. Zero if it never did.
	Heard map[string]time.Time
	// LastChange is when the state last changed for policy.
	LastChange time.Time
	// Events and Applied count the events that changed something for policy,
	// and how often the state was applied for them.
	Events, Applied uint64
}

// resources are all that is watched, in a fixed order.
var resources = []string{pods, namespaces, nodes, policies}

// NewWatcher makes a watcher. Nothing is read before Run.
func NewWatcher(client *Client, log *slog.Logger) *Watcher {
	w := &Watcher{
		client:   client,
		log:      log,
		changed:  make(chan struct{}, 1),
		state:    newState(),
		status:   Status{Errors: map[string]string{}, WatchErrors: map[string]uint64{}},
		failedAt: map[string]time.Time{},
	}
	client.heard.silent = w.failed
	return w
}

// Run follows the server until ctx ends. It calls apply with the whole state
// once all of it has been read, and again after each change that policy can
// see: at once after a single one, and once for all that came while apply ran.
// A server that isn't there, or that forbids something, is tried again and
// again; see Status.
func (w *Watcher) Run(ctx context.Context, apply func(*policycache.Objects)) error {
	factory := informers.NewSharedInformerFactoryWithOptions(w.client.Interface, 0, informers.WithTransform(transform))
	for resource, informer := range map[string]cache.SharedIndexInformer{
		pods:       factory.Core().V1().Pods().Informer(),
		namespaces: factory.Core().V1().Namespaces().Informer(),
		nodes:      factory.Core().V1().Nodes().Informer(),
		policies:   factory.Networking().V1().NetworkPolicies().Informer(),
	} {
		if err := w.follow(resource, informer); err != nil {
			return err
		}
	}
	factory.StartWithContext(ctx)
	defer factory.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), w.synced...) {
		return ctx.Err()
	}
	w.applyNow(apply)
	look := time.NewTicker(time.Second)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-look.C:
			w.Status() // which logs what is well again
		case <-w.changed:
			w.applyNow(apply)
		}
	}
}

// follow subscribes to an informer.
func (w *Watcher) follow(resource string, informer cache.SharedIndexInformer) error {
	err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		w.failed(resource, err)
	})
	if err != nil {
		return fmt.Errorf("watch of %s: %w", resource, err)
	}
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { w.event(o, false) },
		UpdateFunc: func(_, o any) { w.event(o, false) },
		DeleteFunc: func(o any) { w.event(o, true) },
	})
	if err != nil {
		return fmt.Errorf("watch of %s: %w", resource, err)
	}
	// The registration is synced when the first list has come through to us,
	// not only to the informer.
	w.synced = append(w.synced, registration.HasSynced)
	return nil
}

// event takes in one object's change.
func (w *Watcher) event(object any, deleted bool) {
	if unknown, ok := object.(cache.DeletedFinalStateUnknown); ok {
		// The deletion itself was missed, and the state before it may be old;
		// its key is all that counts.
		object = unknown.Obj
	}
	o, ok := object.(*slim)
	if !ok {
		w.log.Error("an event about something unknown was passed over", "type", fmt.Sprintf("%T", object))
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := false
	if deleted {
		changed = w.state.remove(o.resource, o.key())
	} else {
		changed = w.state.set(o)
	}
	if !changed {
		return
	}
	w.status.Events++
	w.status.LastChange = time.Now()
	select {
	case w.changed <- struct{}{}:
	default: // a token is there already
	}
}

// applyNow hands over the state with all changes until now. Changes that come
// meanwhile leave a token of their own.
func (w *Watcher) applyNow(apply func(*policycache.Objects)) {
	select {
	case <-w.changed:
	default:
	}
	w.mu.Lock()
	objects := w.state.take()
	w.mu.Unlock()
	apply(objects)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Loaded = true
	w.status.Applied++
}

// failed notes that a list or a watch went wrong. What passes by itself, such
// as a bookmark too old to go on from, is counted too.
func (w *Watcher) failed(resource string, err error) {
	text := describe(resource, err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.WatchErrors[resource]++
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		w.log.Debug("watch begins anew", "resource", resource, "err", text)
		return
	}
	if w.status.Errors[resource] != text {
		w.log.Warn("the API server can't be watched; the last known state stays in force", "resource", resource, "err", text)
	}
	w.status.Errors[resource] = text
	w.failedAt[resource] = time.Now()
}

// wellAgain forgets the errors of resources that the server has answered for
// since. The caller holds w.mu.
func (w *Watcher) wellAgain() {
	for resource := range w.status.Errors {
		if w.client.heard.at(resource).After(w.failedAt[resource]) {
			delete(w.status.Errors, resource)
			w.log.Info("the API server is being watched again", "resource", resource)
		}
	}
}

// describe says in one line what went wrong, and what to do if a right is
// missing.
func describe(resource string, err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return fmt.Sprintf("no right to list and watch %s: give the service account list and watch on it (%s)", resource, text)
	}
	return text
}

// Status tells how the watcher is doing. It may be called from any goroutine.
func (w *Watcher) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wellAgain()
	s := w.status
	s.Errors, s.WatchErrors, s.Heard = map[string]string{}, map[string]uint64{}, map[string]time.Time{}
	for _, resource := range resources {
		s.WatchErrors[resource] = w.status.WatchErrors[resource]
		s.Heard[resource] = w.client.heard.at(resource)
		if text, ok := w.status.Errors[resource]; ok {
			s.Errors[resource] = text
		}
	}
	return s
}

// Resources lists what is watched, for those who report by resource.
func Resources() []string { return slices.Clone(resources) }
