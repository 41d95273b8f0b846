package manifest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"portcullis/policycache"
)

const (
	// quiet is how long the directory must have been still before it is read:
	// a file that is written in several steps is read once, and whole.
	quiet = 20 * time.Millisecond
	// patience is how long after the first event it is read at the latest.
	patience = 30 * time.Millisecond
	// settled is how old a file must be when it is read for its time to tell a later
	// write: longer than the coarsest clock of a file system.
	settled = 2 * time.Second
	// retry is the interval of looking where no events come: the directory is
	// gone, or can't be watched.
	retry = time.Second
	// rescan is the interval of looking even though nothing is said to have
	// happened. It finds what events don't tell, such as a change behind a
	// link to another directory.
	rescan = 30 * time.Second
)

// Watcher follows a directory of manifests. A file that can't be read or
// decoded keeps its last good state in force and doesn't affect the others.
//
// Files had best be replaced by renaming, as kubelet and most editors do. One
// that is written in place is read when nobody has written to it for 20 ms; a
// writer that pauses for longer may be seen half-way, which the decoder usually
// notices, as it is noticed when a file that had objects is suddenly empty.
type Watcher struct {
	dir string
	log *slog.Logger

	// What follows is Run's alone.
	files    map[string]*file
	objs     *policycache.Objects
	warned   map[doubled]bool
	dirError string
	failed   uint64
	reads    int // files read, for tests

	mu     sync.Mutex
	status Status
}

// file is what is known of one file.
type file struct {
	// objs is the last good state, nil if there was none yet.
	objs *policycache.Objects
	// sum is of the content last read; decoded tells that there was one.
	sum     [sha256.Size]byte
	decoded bool
	// err is what is wrong with the file now, in one line, or "".
	err string
	// info is of the file as it was last read; nil if what may have been written
	// since wouldn't show in it.
	info os.FileInfo
}

// Status is how a Watcher is doing.
type Status struct {
	// Loaded tells that the first state has been applied.
	Loaded bool
	// Files counts the manifest files that are there, wrong ones included.
	Files int
	// Errors has one line for each file that is wrong now, by its name; or for
	// the directory itself, by its path.
	Errors map[string]string
	// FailedLoads counts the times that a file was read and found wrong.
	FailedLoads uint64
	// LastChange is when the state last changed.
	LastChange time.Time
	// NeverLoaded are the wrong files without a good state to fall back on,
	// sorted. Nobody knows whom they would isolate.
	NeverLoaded []string
}

// NewWatcher prepares to follow dir, a directory of manifests or one manifest
// file. It is an error if dir can't be read.
func NewWatcher(dir string, log *slog.Logger) (*Watcher, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("can't read the manifests: %w", err)
	}
	if _, err := list(path); err != nil {
		return nil, err
	}
	return &Watcher{dir: path, log: log, files: map[string]*file{}, objs: policycache.NewObjects(), warned: map[doubled]bool{}}, nil
}

// Status may be called from any goroutine.
func (w *Watcher) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.status
	s.Errors = maps.Clone(s.Errors)
	s.NeverLoaded = slices.Clone(s.NeverLoaded)
	return s
}

// Run calls apply with the whole state at once, and again after each change
// that alters it, until ctx ends. Objects that haven't changed keep their
// pointers from call to call. Calls never overlap, and apply must not change
// what it is given. Run may be called once; it is an error if the directory
// can't be read when it starts.
func (w *Watcher) Run(ctx context.Context, apply func(*policycache.Objects)) error {
	n := newNotifier(w.dir, w.log)
	defer n.close()
	n.renew()
	w.scan(time.Now(), true)
	if w.dirError != "" {
		return errors.New(w.dirError)
	}
	w.apply(apply)

	next := w.plan(time.Now(), n.watching, false)
	timer := time.NewTimer(rescan)
	defer timer.Stop()
	for {
		timer.Reset(time.Until(next.at))
		select {
		case <-ctx.Done():
			return nil
		case ev, ok := <-n.events():
			if n.concerns(ev, ok) {
				next.event(time.Now())
			}
			continue
		case err := <-n.errors():
			n.failed(err)
			next.event(time.Now())
			continue
		case <-timer.C:
		}
		n.renew()
		changed, unfinished := w.scan(time.Now(), false)
		if changed {
			w.apply(apply)
		}
		next = w.plan(time.Now(), n.watching, unfinished)
	}
}

// plan says when to look again if nothing is heard.
func (w *Watcher) plan(now time.Time, watching, unfinished bool) debounce {
	switch {
	case unfinished:
		// Whoever is changed meanwhile doesn't keep those waiting any longer.
		return debounce{at: now.Add(quiet), limit: now.Add(quiet)}
	case w.dirError != "" || !watching:
		return debounce{at: now.Add(retry)}
	}
	return debounce{at: now.Add(rescan)}
}

func (w *Watcher) apply(apply func(*policycache.Objects)) {
	apply(w.objs)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Loaded = true
	w.status.LastChange = time.Now()
}

// scan reads the files whose content has changed, and tells whether the state
// has, and whether there are files that are being written at this moment. At
// the first scan those are read too: there is no good state to wait with.
func (w *Watcher) scan(now time.Time, first bool) (changed, unfinished bool) {
	defer w.publish()
	paths, err := list(w.dir)
	if err != nil {
		// The directory may be on its way of being replaced. What it held
		// stays in force: had it been meant to go, the files would have been
		// deleted.
		w.dirFailed(err.Error())
		return false, false
	}
	w.dirFailed("")
	there := map[string]bool{}
	for _, path := range paths {
		name := filepath.Base(path)
		there[name] = true
		if !first && beingWritten(path, now) {
			unfinished = true
			continue
		}
		if w.files[name] == nil {
			w.files[name] = &file{}
		}
		w.load(name, path)
	}
	for name := range w.files {
		if !there[name] {
			w.log.Debug("manifest file is gone", "file", name)
			delete(w.files, name)
		}
	}
	return w.combine(), unfinished
}

// beingWritten tells whether the file was changed so recently that more may
// follow. A time in the future says nothing.
func beingWritten(path string, now time.Time) bool {
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	age := now.Sub(info.ModTime())
	return age >= 0 && age < quiet
}

// unchanged tells whether a file is, by all that its inode says, the one that was
// read.
func (f *file) unchanged(now os.FileInfo) bool {
	return f.info != nil && os.SameFile(f.info, now) && f.info.Size() == now.Size() && f.info.ModTime().Equal(now.ModTime())
}

// load reads one file, if its content isn't the one last read.
func (w *Watcher) load(name, path string) {
	f := w.files[name]
	info, err := os.Stat(path)
	if err == nil && f.decoded && f.unchanged(info) {
		return
	}
	f.info = nil
	w.reads++
	data, err := os.ReadFile(path)
	if err != nil {
		f.decoded = false
		if text := unreadable(err).Error(); text != f.err {
			w.fileFailed(name, f, text)
		}
		return
	}
	if info != nil && time.Since(info.ModTime()) > settled {
		f.info = info
	}
	sum := sha256.Sum256(data)
	if f.decoded && sum == f.sum {
		return
	}
	f.sum, f.decoded = sum, true
	if len(bytes.TrimSpace(data)) == 0 && f.objs != nil && count(f.objs) > 0 {
		w.fileFailed(name, f, "the file is empty, half written perhaps: to take its objects away, delete the file")
		return
	}
	objs, errs := decode(name, data, w.log)
	if len(errs) > 0 {
		w.fileFailed(name, f, summary(errs))
		return
	}
	if f.err != "" {
		w.log.Info("manifest file is in order again", "file", name)
	}
	f.objs, f.err = objs, ""
}

func count(o *policycache.Objects) int {
	return len(o.Pods) + len(o.Namespaces) + len(o.Nodes) + len(o.Policies)
}

// summary is one line of at most three errors, and how many more there are.
func summary(errs []error) string {
	var texts []string
	for i, err := range errs {
		if i == 3 {
			texts = append(texts, fmt.Sprintf("and %d more", len(errs)-i))
			break
		}
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

func (w *Watcher) fileFailed(name string, f *file, text string) {
	w.failed++
	if text == f.err {
		return
	}
	f.err = text
	inForce := "its last good state"
	if f.objs == nil {
		inForce = "nothing of it"
	}
	w.log.Error("manifest file is wrong", "file", name, "error", text, "inForce", inForce)
}

func (w *Watcher) dirFailed(text string) {
	if text != "" && text != w.dirError {
		w.log.Error("the manifests can't be read, the last state stays in force", "error", text)
	}
	if text == "" && w.dirError != "" {
		w.log.Info("the manifests can be read again", "dir", w.dir)
	}
	w.dirError = text
}

// combine makes the state of the files', and tells whether it has changed.
func (w *Watcher) combine() (changed bool) {
	var parts []part
	for _, name := range slices.Sorted(maps.Keys(w.files)) {
		if f := w.files[name]; f.objs != nil {
			parts = append(parts, part{name, f.objs})
		}
	}
	objs, twice := union(parts)
	warned := map[doubled]bool{}
	for _, d := range twice {
		if !w.warned[d] {
			w.log.Warn(d.String())
		}
		warned[d] = true
	}
	w.warned = warned
	if !adopt(objs, w.objs) {
		return false
	}
	w.objs = objs
	return true
}

// publish makes Status tell what the last scan has found.
func (w *Watcher) publish() {
	errs := map[string]string{}
	var never []string
	for _, name := range slices.Sorted(maps.Keys(w.files)) {
		f := w.files[name]
		if f.err != "" {
			errs[name] = f.err
		}
		if f.objs == nil {
			never = append(never, name)
		}
	}
	if w.dirError != "" {
		errs[w.dir] = w.dirError
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Files, w.status.Errors, w.status.NeverLoaded = len(w.files), errs, never
	w.status.FailedLoads = w.failed
}
