package manifest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
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
	// quiet is how long a file must have been still before it is read: one that is
	// written in several steps is read once, and whole.
	quiet = 20 * time.Millisecond
	// patience is how long after the first event a file is looked at, at the latest.
	patience = 30 * time.Millisecond
	// gather is the time between two looks at least, in which what is due is gathered
	// for one compile.
	gather = 5 * time.Millisecond
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
	state    *merger
	dirError string
	failed   uint64
	links    bool // some files are links, whose events may bear other names
	reads    int  // files read, for tests

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
	return &Watcher{dir: path, log: log, files: map[string]*file{}, state: newMerger()}, nil
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
// that alters it, until ctx ends; each state but the first names what has changed.
// Objects that haven't changed keep their pointers from call to call. Calls never
// overlap, and apply must not change what it is given. Run may be called once; it is
// an error if the directory can't be read when it starts.
func (w *Watcher) Run(ctx context.Context, apply func(*policycache.Objects)) error {
	n := newNotifier(w.dir, w.log)
	defer n.close()
	n.renew()
	w.scan(time.Now(), true)
	if w.dirError != "" {
		return errors.New(w.dirError)
	}
	w.apply(apply)

	next := newAgenda()
	w.plan(next, time.Now(), n.watching, true, nil)
	timer := time.NewTimer(rescan)
	defer timer.Stop()
	for {
		timer.Reset(time.Until(next.at()))
		select {
		case <-ctx.Done():
			return nil
		case ev, ok := <-n.events():
			if name, concerned := w.concerned(n.concerns(ev, ok)); concerned {
				next.event(name, time.Now())
			}
			continue
		case err := <-n.errors():
			n.failed(err)
			next.event(everything, time.Now())
			continue
		case <-timer.C:
		}
		now := time.Now()
		anew := n.renew()
		names, all := next.take(now)
		changed, unfinished := w.look(now, names, all || anew)
		if changed {
			w.apply(apply)
		}
		w.plan(next, time.Now(), n.watching, all || anew, unfinished)
	}
}

// concerned narrows or widens what the notifier says that an event concerns: other files
// than manifests don't count, unless links lead to them.
func (w *Watcher) concerned(name string, concerned bool) (string, bool) {
	if w.links {
		return everything, concerned
	}
	return name, concerned && (name == everything || isManifestName(name))
}

// plan notes when to look again if nothing is heard: at files that were being written
// when they will have been still, however much else changes, and at all of them.
func (w *Watcher) plan(next *agenda, now time.Time, watching, all bool, unfinished map[string]time.Time) {
	next.rest(now)
	for name, at := range unfinished {
		next.put(name, appointment{at, at})
	}
	switch {
	case w.dirError != "" || !watching:
		next.put(everything, appointment{at: now.Add(retry)})
	case all:
		next.put(everything, appointment{at: now.Add(rescan)})
	}
}

func (w *Watcher) apply(apply func(*policycache.Objects)) {
	apply(w.state.objs)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Loaded = true
	w.status.LastChange = time.Now()
}

// look reads those files, or all, as far as their content has changed. It tells whether
// the state has, and which files are being written at this moment, with the time at
// which they will have been still. An absence is only believed of the directory's files
// if it is the same one before and after.
func (w *Watcher) look(now time.Time, names []string, all bool) (changed bool, unfinished map[string]time.Time) {
	before, err := os.Stat(w.dir)
	if all || err != nil || !before.IsDir() {
		return w.scan(now, false)
	}
	unfinished = map[string]time.Time{}
	var gone []string
	for _, name := range names {
		if there := w.lookAt(now, name, unfinished); !there {
			gone = append(gone, name)
		}
	}
	if after, err := os.Stat(w.dir); err != nil || !os.SameFile(before, after) {
		return w.scan(now, false)
	}
	for _, name := range gone {
		w.forget(name)
	}
	w.publish()
	return w.settle(), unfinished
}

// lookAt reads one file of the directory, and tells whether there is such a manifest.
func (w *Watcher) lookAt(now time.Time, name string, unfinished map[string]time.Time) (there bool) {
	path := filepath.Join(w.dir, name)
	info, err := os.Lstat(path)
	if err != nil || !isManifest(path, fs.FileInfoToDirEntry(info)) {
		return false
	}
	w.links = w.links || info.Mode()&fs.ModeSymlink != 0
	if at, yes := beingWritten(path, now); yes {
		unfinished[name] = at
		return true
	}
	w.load(name, path)
	return true
}

// scan is look at everything. At the first one files are read that are being written
// too: there is no good state to wait with.
func (w *Watcher) scan(now time.Time, first bool) (changed bool, unfinished map[string]time.Time) {
	defer w.publish()
	paths, err := list(w.dir)
	if err != nil {
		// The directory may be on its way of being replaced. What it held
		// stays in force: had it been meant to go, the files would have been
		// deleted.
		w.dirFailed(err.Error())
		return false, nil
	}
	w.dirFailed("")
	w.links = slices.ContainsFunc(paths, isLink)
	unfinished = map[string]time.Time{}
	there := map[string]bool{}
	for _, path := range paths {
		name := filepath.Base(path)
		there[name] = true
		if at, yes := beingWritten(path, now); yes && !first {
			unfinished[name] = at
			continue
		}
		w.load(name, path)
	}
	for name := range w.files {
		if !there[name] {
			w.forget(name)
		}
	}
	return w.settle(), unfinished
}

func isLink(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&fs.ModeSymlink != 0
}

// forget takes away what a file that is gone gave.
func (w *Watcher) forget(name string) {
	if f := w.files[name]; f != nil {
		w.log.Debug("manifest file is gone", "file", name)
		w.state.replace(name, f.objs, nil)
		delete(w.files, name)
	}
}

// beingWritten tells whether the file was changed so recently that more may
// follow, and when it will have been still. A time in the future says nothing.
func beingWritten(path string, now time.Time) (until time.Time, yes bool) {
	info, err := os.Stat(path)
	if err != nil {
		return time.Time{}, false
	}
	age := now.Sub(info.ModTime())
	return info.ModTime().Add(quiet), age >= 0 && age < quiet
}

// unchanged tells whether a file is, by all that its inode says, the one that was
// read.
func (f *file) unchanged(now os.FileInfo) bool {
	return f.info != nil && os.SameFile(f.info, now) && f.info.Size() == now.Size() && f.info.ModTime().Equal(now.ModTime())
}

// load reads one file, if its content isn't the one last read.
func (w *Watcher) load(name, path string) {
	f := w.files[name]
	if f == nil {
		f = &file{}
		w.files[name] = f
	}
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
	w.state.replace(name, f.objs, objs)
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

// settle makes the state of what has been read, and tells whether it has changed.
func (w *Watcher) settle() (changed bool) {
	changed, twice := w.state.settle()
	for _, d := range twice {
		w.log.Warn(d.String())
	}
	return changed
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
