package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// again is when a file that was found half written is read again; until then
	// another event usually has come.
	again = 10 * time.Millisecond
	// rescan is how often all files are looked at even if nothing was heard.
	rescan = 30 * time.Second
)

// Watcher follows the cache. What it knows of a pod is used where the API doesn't
// know it yet: see Fill.
type Watcher struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	files map[string]*result // by file name; nil values are files of no interest
	made  map[string]filled  // by the pod's key
}

// NewWatcher prepares to follow dir, usually /var/lib/cni/results. It is an error if
// dir can't be read.
func NewWatcher(dir string, log *slog.Logger) (*Watcher, error) {
	if _, err := os.ReadDir(dir); err != nil {
		return nil, fmt.Errorf("read the CNI plugins' results: %w", err)
	}
	return &Watcher{dir: dir, log: log, files: map[string]*result{}, made: map[string]filled{}}, nil
}

// Run follows the directory until ctx ends. It calls changed whenever a pod's
// addresses have come or gone.
func (w *Watcher) Run(ctx context.Context, changed func()) {
	events, lost, stop := w.subscribe()
	defer stop()
	var half map[string]bool // files found half written
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		did := false
		select {
		case <-ctx.Done():
			return
		case ev, ok := <-events:
			if !ok {
				events, lost = nil, nil // the periodic look has to do
				continue
			}
			var whole bool
			if did, whole = w.look(filepath.Base(ev.Name)); !whole {
				if half == nil {
					half = map[string]bool{}
					timer.Reset(again)
				}
				half[filepath.Base(ev.Name)] = true
			}
		case err := <-lost: // events were, so all is looked at
			w.log.Debug("events about the CNI plugins' results were lost", "err", err)
			did = w.lookAtAll()
		case <-timer.C:
			// What is still not whole is left to its next event, or to the next look
			// at everything.
			if half == nil {
				did = w.lookAtAll()
			}
			for name := range half {
				d, _ := w.look(name)
				did = did || d
			}
			half = nil
			timer.Reset(rescan)
		}
		if did {
			changed()
		}
	}
}

// subscribe asks for events. Where they can't be had the channels are nil, which is
// said once: then only the periodic look finds what has changed.
func (w *Watcher) subscribe() (events <-chan fsnotify.Event, lost <-chan error, stop func()) {
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		if err = watcher.Add(w.dir); err != nil {
			watcher.Close()
		}
	}
	if err != nil {
		w.log.Warn("changes of the CNI plugins' results aren't announced, looking for them every half minute", "dir", w.dir, "err", err)
		return nil, nil, func() {}
	}
	return watcher.Events, watcher.Errors, func() { watcher.Close() }
}

// lookAtAll reads what is new or newer in the directory, and forgets what is gone.
func (w *Watcher) lookAtAll() (changed bool) {
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		w.log.Warn("the CNI plugins' results can't be read", "dir", w.dir, "err", err)
		return false
	}
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
	}
	w.mu.Lock()
	for name := range w.files {
		names[name] = true
	}
	w.mu.Unlock()
	for name := range names {
		did, _ := w.look(name)
		changed = changed || did
	}
	return changed
}

// look reads one file again. It tells whether what is known of a pod has changed, and
// whether the file could be read: it can't while it is being written.
func (w *Watcher) look(name string) (changed, whole bool) {
	r, err := read(filepath.Join(w.dir, name))
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.files[name]
	switch {
	case errors.Is(err, fs.ErrNotExist):
		delete(w.files, name)
		return old != nil, true
	case err != nil:
		w.log.Debug("a CNI plugin's result can't be read", "file", name, "err", err)
		return false, false
	}
	w.files[name] = r
	if r != nil && (old == nil || !r.equal(old)) {
		w.log.Debug("a pod was given addresses", "pod", r.key(), "addresses", r.addrs)
		return true, true
	}
	return r == nil && old != nil, true
}

// Links gives the interfaces on the node's side, bridges among them, that the CNI
// plugins have named for pods, by the pods' keys and UIDs (empty where unknown).
func (w *Watcher) Links() map[PodID][]string {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := map[PodID][]string{}
	for key, r := range w.newest() {
		all[PodID{key, r.uid}] = r.links
	}
	return all
}

// PodID names a pod, by "namespace/name" and its UID.
type PodID struct{ Key, UID string }

// Count gives the number of pods whose addresses are known.
func (w *Watcher) Count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.newest())
}
