package manifest

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/fsnotify/fsnotify"
)

// notifier tells that something may have changed in the directory, or in the
// file, that it watches. It watches the directory above too, since a directory
// may be replaced as a whole, by renaming or by turning a link, and since a
// file is best watched through its directory.
type notifier struct {
	path string
	log  *slog.Logger
	fs   *fsnotify.Watcher
	// seen is the directory that is watched, for another one may come to be at
	// the same path; nil when path is a file.
	seen os.FileInfo
	// watching is false when no events can come, so that one has to look
	// without them; warned keeps that from being said again and again.
	watching, warned bool
}

func newNotifier(path string, log *slog.Logger) *notifier {
	return &notifier{path: path, log: log}
}

// renew makes sure that it is the directory now at the path that is watched, and tells
// whether it wasn't, so that what has happened in it isn't known. It must come before
// reading the directory, or a change between the two would go unnoticed.
func (n *notifier) renew() (anew bool) {
	before := n.seen
	err := n.watch()
	anew = n.seen != before
	n.watching = err == nil
	// That the path is gone is for the reader of the directory to report.
	if err != nil && !n.warned && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("changes of the manifests aren't announced, looking for them every second", "error", err)
	}
	n.warned = err != nil
	return anew
}

func (n *notifier) watch() error {
	if n.fs == nil {
		w, err := fsnotify.NewWatcher()
		if err != nil {
			return err
		}
		n.fs, n.seen = w, nil
	}
	info, err := os.Stat(n.path)
	if err != nil {
		return err
	}
	watched, above := n.fs.WatchList(), filepath.Dir(n.path)
	if !slices.Contains(watched, above) {
		// For a directory this one is a help but no need.
		if err := n.fs.Add(above); err != nil && !info.IsDir() {
			return err
		}
	}
	if !info.IsDir() {
		n.seen = nil
		return nil
	}
	if n.seen != nil && os.SameFile(n.seen, info) && slices.Contains(watched, n.path) {
		return nil
	}
	// The error would be that it wasn't watched.
	_ = n.fs.Remove(n.path)
	n.seen = info
	return n.fs.Add(n.path)
}

// events is a channel that is nil, and so never ready, without a watcher.
func (n *notifier) events() <-chan fsnotify.Event {
	if n.fs == nil {
		return nil
	}
	return n.fs.Events
}

func (n *notifier) errors() <-chan error {
	if n.fs == nil {
		return nil
	}
	return n.fs.Errors
}

// concerns tells whether the event, received with ok, may be about manifests, and about
// which of the directory's files, or everything. ConfigMaps are mounted as links through
// "..data", which is what changes.
func (n *notifier) concerns(ev fsnotify.Event, ok bool) (name string, concerned bool) {
	if !ok {
		n.close()
		return everything, true
	}
	base := filepath.Base(ev.Name)
	switch {
	case ev.Name == n.path || base == "..data":
		return everything, true
	case n.seen != nil && filepath.Dir(ev.Name) == n.path:
		return base, true
	}
	return "", false
}

// failed deals with an error of the watcher: events were lost, or it is dead
// (nil, from a closed channel). Both are made good by looking.
func (n *notifier) failed(err error) {
	if err == nil {
		n.close()
		return
	}
	n.log.Debug("events about the manifests were lost, reading all of them", "error", err)
}

func (n *notifier) close() {
	if n.fs != nil {
		// Closing can't fail in a way that mattered: the watcher is given up.
		_ = n.fs.Close()
		n.fs = nil
	}
}
