package manifest

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"portcullis/policycache"
)

const wrong = "apiVersion: v1\nkind: Pod\nmetadata: {name: a\n"

// logBuffer is a log that may be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	out bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.Write(p)
}

func (b *logBuffer) count(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.out.String(), text)
}

// watch is a Watcher that runs, or one whose scans a test makes by hand.
type watch struct {
	*testing.T
	dir    string
	w      *Watcher
	log    *logBuffer
	states chan *policycache.Objects
}

func newWatch(t *testing.T, path string) *watch {
	t.Helper()
	log := &logBuffer{}
	w, err := NewWatcher(path, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return &watch{T: t, dir: path, w: w, log: log, states: make(chan *policycache.Objects, 100)}
}

// run starts the Watcher and ends it with the test.
func (w *watch) run() *watch {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.w.Run(ctx, func(o *policycache.Objects) { w.states <- o }) }()
	w.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			w.Errorf("Run: %v", err)
		}
	})
	return w
}

// await waits for a state that holds what want says, and gives it. States on
// the way there are passed over, for one change may show in several steps.
func (w *watch) await(want string) *policycache.Objects {
	w.Helper()
	last := "none"
	limit := time.After(10 * time.Second)
	for {
		select {
		case o := <-w.states:
			if last = labelled(o); last == want {
				return o
			}
		case <-limit:
			w.Fatalf("waited for the state %q in vain, the last one was %q, status %+v", want, last, w.w.Status())
		}
	}
}

// until waits for the status to be as ok says.
func (w *watch) until(what string, ok func(Status) bool) Status {
	w.Helper()
	for range 1000 {
		if s := w.w.Status(); ok(s) {
			return s
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.Fatalf("waited in vain for: %s; status %+v", what, w.w.Status())
	return Status{}
}

// labelled names a state's pods with their label v: "a=1 b=2".
func labelled(o *policycache.Objects) string {
	var pods []string
	for _, name := range []string{"a", "b", "c"} {
		if p := o.Pods["default/"+name]; p != nil {
			pods = append(pods, name+"="+p.Labels["v"])
		}
	}
	return strings.Join(pods, " ")
}

// later is long enough after everything the test has written by now.
func later() time.Time { return time.Now().Add(time.Second) }

// scan looks once and tells whether the state has changed.
func (w *watch) scan() bool {
	changed, _ := w.w.scan(later(), false)
	return changed
}

// state checks the state after a scan by hand.
func (w *watch) state(want string) {
	w.Helper()
	if got := labelled(w.w.state.objs); got != want {
		w.Errorf("state %q, want %q", got, want)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func TestWatchFollows(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", pod("a", "1"))
	w := newWatch(t, dir).run()
	w.await("a=1")
	write(t, dir, "b.yaml", pod("b", "1"))
	w.await("a=1 b=1")
	if err := os.WriteFile(filepath.Join(dir, "b.yaml"), []byte(pod("b", "in-place")), 0o600); err != nil {
		t.Fatal(err)
	}
	w.await("a=1 b=in-place")
	write(t, dir, "a.yaml", pod("a", "2"))
	w.await("a=2 b=in-place")
	remove(t, filepath.Join(dir, "b.yaml"))
	w.await("a=2")
	if s := w.until("the first state has been applied", func(s Status) bool { return s.Loaded }); s.Files != 1 || len(s.Errors) != 0 || s.FailedLoads != 0 || s.LastChange.IsZero() {
		t.Errorf("status %+v", s)
	}
}

func TestWatchHalfWritten(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	write(t, dir, "a.yaml", pod("a", "1"))
	w := newWatch(t, dir).run()
	w.await("a=1")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text := pod("a", "2")
	fmt.Fprint(f, text[:len(text)-10])
	s := w.until("an error", func(s Status) bool { return s.Errors["a.yaml"] != "" })
	if len(s.NeverLoaded) != 0 || s.FailedLoads == 0 {
		t.Errorf("status %+v", s)
	}
	// The other files go on meanwhile, beside the last good state of this one.
	write(t, dir, "b.yaml", pod("b", "1"))
	w.await("a=1 b=1")
	fmt.Fprint(f, text[len(text)-10:])
	w.await("a=2 b=1")
	w.until("no error", func(s Status) bool { return len(s.Errors) == 0 })
}

func TestWatchConfigMapSwap(t *testing.T) {
	dir := t.TempDir()
	write(t, mkdir(t, filepath.Join(dir, "..1")), "a.yaml", pod("a", "1"))
	symlink(t, "..1", filepath.Join(dir, "..data"))
	symlink(t, "..data/a.yaml", filepath.Join(dir, "a.yaml"))
	w, file := newWatch(t, dir).run(), newWatch(t, filepath.Join(dir, "a.yaml")).run()
	w.await("a=1")
	file.await("a=1")
	write(t, mkdir(t, filepath.Join(dir, "..2")), "a.yaml", pod("a", "2"))
	symlink(t, "..2", filepath.Join(dir, "..data_tmp"))
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	remove(t, filepath.Join(dir, "..1"))
	w.await("a=2")
	file.await("a=2")
}

func TestWatchOneFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "state", pod("a", "1"))
	w := newWatch(t, filepath.Join(dir, "state")).run()
	w.await("a=1")
	write(t, dir, "state", pod("a", "2"))
	w.await("a=2")
}

// While the directory is gone, what it held stays in force.
func TestWatchDirectoryReplaced(t *testing.T) {
	above := t.TempDir()
	dir := mkdir(t, filepath.Join(above, "manifests"))
	write(t, dir, "a.yaml", pod("a", "1"))
	w := newWatch(t, dir).run()
	w.await("a=1")
	if err := os.Rename(dir, filepath.Join(above, "old")); err != nil {
		t.Fatal(err)
	}
	s := w.until("an error", func(s Status) bool { return s.Errors[dir] != "" })
	if s.Files != 1 || len(s.NeverLoaded) != 0 {
		t.Errorf("status %+v", s)
	}
	select {
	case o := <-w.states:
		t.Errorf("the state became %q", labelled(o))
	default:
	}
	write(t, mkdir(t, dir), "a.yaml", pod("a", "2"))
	w.await("a=2")
	w.until("no error", func(s Status) bool { return len(s.Errors) == 0 })
	write(t, dir, "b.yaml", pod("b", "1"))
	w.await("a=2 b=1")
}

func TestWatchDirectoryIsALink(t *testing.T) {
	above := t.TempDir()
	write(t, mkdir(t, filepath.Join(above, "v1")), "a.yaml", pod("a", "1"))
	write(t, mkdir(t, filepath.Join(above, "v2")), "a.yaml", pod("a", "2"))
	link := filepath.Join(above, "manifests")
	symlink(t, "v1", link)
	w := newWatch(t, link).run()
	w.await("a=1")
	symlink(t, "v2", link+".new")
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	w.await("a=2")
	write(t, filepath.Join(above, "v2"), "b.yaml", pod("b", "1"))
	w.await("a=2 b=1")
}

// Whatever becomes of the events, the directory is looked at again.
func TestWatchOutlivesItsNotifier(t *testing.T) {
	dir := t.TempDir()
	n := newNotifier(dir, slog.New(slog.DiscardHandler))
	n.renew()
	if !n.watching || n.events() == nil {
		t.Fatal("not watching")
	}
	if err := n.fs.Close(); err != nil {
		t.Fatal(err)
	}
	ev, ok := <-n.events()
	if name, concerned := n.concerns(ev, ok); ok || !concerned || name != everything || n.events() != nil || n.errors() != nil {
		t.Error("a dead notifier must ask for a look, and be silent from then on")
	}
	if !n.renew() {
		t.Error("a new notifier doesn't say that it knows nothing of what has happened")
	}
	defer n.close()
	write(t, dir, "a.yaml", pod("a", "1"))
	ev = <-n.events()
	if _, concerned := n.concerns(ev, true); !concerned {
		t.Errorf("event %v after renewing doesn't concern the directory", ev)
	}
}

func TestWatchNeverLoaded(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", wrong)
	write(t, dir, "b.yaml", pod("b", "1"))
	w := newWatch(t, dir).run()
	w.await("b=1")
	if s := w.until("the first state has been applied", func(s Status) bool { return s.Loaded }); fmt.Sprint(s.NeverLoaded) != "[a.yaml]" || s.Files != 2 || !strings.Contains(s.Errors["a.yaml"], "document 1: yaml:") {
		t.Errorf("status %+v", s)
	}
	write(t, dir, "a.yaml", pod("a", "1"))
	w.await("a=1 b=1")
	if s := w.until("no error", func(s Status) bool { return len(s.Errors) == 0 }); len(s.NeverLoaded) != 0 || s.FailedLoads != 1 {
		t.Errorf("status %+v", s)
	}
}

func TestWatchUnreadableAtStart(t *testing.T) {
	if _, err := NewWatcher(filepath.Join(t.TempDir(), "nowhere"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("NewWatcher takes a directory that isn't there")
	}
	dir := mkdir(t, filepath.Join(t.TempDir(), "manifests"))
	w := newWatch(t, dir)
	remove(t, dir)
	if err := w.w.Run(context.Background(), func(*policycache.Objects) { t.Error("applied a state that can't be read") }); err == nil {
		t.Error("Run starts without a directory")
	}
}

func TestScanLogsOncePerError(t *testing.T) {
	dir := t.TempDir()
	w := newWatch(t, dir)
	write(t, dir, "a.yaml", pod("a", "1"))
	w.scan()
	for _, c := range []struct {
		rule, text     string
		logged, failed int
	}{
		{"wrong", wrong, 1, 1},
		{"unchanged", wrong, 1, 1},
		{"wrong in the same way", strings.Replace(wrong, "v1", "v2", 1), 1, 2},
		{"wrong in another way", "kind: Pod\n", 2, 3},
		{"suddenly empty", "", 3, 4},
		{"right", pod("a", "2"), 3, 4},
		{"wrong again", wrong, 4, 5},
	} {
		write(t, dir, "a.yaml", c.text)
		w.scan()
		w.scan()
		s := w.w.Status()
		if got := w.log.count("manifest file is wrong"); got != c.logged || s.FailedLoads != uint64(c.failed) {
			t.Errorf("%s: logged %d times and counted %d, want %d and %d", c.rule, got, s.FailedLoads, c.logged, c.failed)
		}
		if strings.Contains(s.Errors["a.yaml"], "\n") || (s.Errors["a.yaml"] == "") != (c.rule == "right") {
			t.Errorf("%s: error %q", c.rule, s.Errors["a.yaml"])
		}
	}
	w.state("a=2")
}

// Emptying a file takes its objects away only if it says so: no content at all
// is what a file looks like that somebody has just begun to write.
func TestScanEmptyFile(t *testing.T) {
	dir := t.TempDir()
	w := newWatch(t, dir)
	write(t, dir, "a.yaml", pod("a", "1"))
	write(t, dir, "new.yaml", "")
	w.scan()
	if s := w.w.Status(); len(s.Errors) != 0 || s.Files != 2 {
		t.Errorf("status %+v", s)
	}
	for _, nothing := range []string{"", "\n", " \r\n"} {
		write(t, dir, "a.yaml", nothing)
		w.scan()
		w.state("a=1")
	}
	write(t, dir, "a.yaml", "# nothing any more\n")
	w.scan()
	w.state("")
}

func TestScanWaitsForTheWriter(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	written := time.Now().Add(-time.Hour)
	put := func(label string) {
		write(t, dir, "a.yaml", pod("a", label))
		if err := os.Chtimes(path, written, written); err != nil {
			t.Fatal(err)
		}
	}
	w := newWatch(t, dir)
	put("1")
	if _, unfinished := w.w.scan(written.Add(quiet/2), true); len(unfinished) > 0 {
		t.Error("the first scan must read everything")
	}
	w.state("a=1")
	put("2")
	if _, unfinished := w.w.scan(written.Add(quiet/2), false); !unfinished["a.yaml"].Equal(written.Add(quiet)) {
		t.Error("a file written 10 ms ago isn't waited for")
	}
	w.state("a=1")
	w.w.scan(written.Add(quiet), false)
	w.state("a=2")
	put("3")
	w.w.scan(written.Add(-time.Minute), false)
	w.state("a=3")
}

func TestScanUnreadableFile(t *testing.T) {
	dir := t.TempDir()
	w := newWatch(t, dir)
	write(t, mkdir(t, filepath.Join(dir, "..data")), "a.yaml", pod("a", "1"))
	symlink(t, "..data/a.yaml", filepath.Join(dir, "a.yaml"))
	w.scan()
	remove(t, filepath.Join(dir, "..data"))
	for range 3 {
		w.scan()
	}
	w.state("a=1")
	if s := w.w.Status(); s.Errors["a.yaml"] != "can't be read: no such file or directory" || s.FailedLoads != 1 || w.log.count("manifest file is wrong") != 1 {
		t.Errorf("status %+v", s)
	}
	// The same content as before must clear the error.
	write(t, mkdir(t, filepath.Join(dir, "..data")), "a.yaml", pod("a", "1"))
	if changed := w.scan(); changed || len(w.w.Status().Errors) != 0 {
		t.Errorf("changed %t, status %+v", changed, w.w.Status())
	}
}

func TestScanKeepsPointers(t *testing.T) {
	dir := t.TempDir()
	w := newWatch(t, dir)
	all := func(v string) string {
		return pod("a", "1") + "---\n" + pod("b", v) + "---\n" + polP + "---\n" + "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n"
	}
	write(t, dir, "a.yaml", all("1"))
	w.scan()
	old := w.w.state.objs
	if w.scan() {
		t.Error("nothing changed, and yet the state has")
	}
	write(t, dir, "a.yaml", "# a remark\n"+all("1"))
	if w.scan() || w.w.state.objs != old {
		t.Error("a remark changes no state")
	}
	remove(t, filepath.Join(dir, "a.yaml"))
	write(t, dir, "z.yaml", all("2"))
	if !w.scan() {
		t.Error("pod b changed, and the state hasn't")
	}
	now := w.w.state.objs
	if now.Pods["default/a"] != old.Pods["default/a"] || now.Policies["default/p"] != old.Policies["default/p"] ||
		now.Nodes["n1"] != old.Nodes["n1"] || now.Namespaces["default"] != old.Namespaces["default"] {
		t.Error("objects that are equal have new pointers")
	}
	if now.Pods["default/b"] == old.Pods["default/b"] || old.Pods["default/b"].Labels["v"] != "1" || now.Pods["default/b"].Labels["v"] != "2" {
		t.Error("a changed object must be another one, and the old one stay as it was")
	}
}

func TestScanOneObjectInTwoFiles(t *testing.T) {
	dir := t.TempDir()
	w := newWatch(t, dir)
	write(t, dir, "b.yaml", pod("a", "b"))
	write(t, dir, "a.yaml", pod("a", "a"))
	w.scan()
	w.state("a=b")
	write(t, dir, "a.yaml", pod("a", "changed"))
	w.scan()
	w.state("a=b")
	if got := w.log.count("level=WARN"); got != 1 {
		t.Errorf("%d warnings, want 1", got)
	}
	remove(t, filepath.Join(dir, "b.yaml"))
	w.scan()
	w.state("a=changed")
	write(t, dir, "b.yaml", pod("a", "b"))
	w.scan()
	if got := w.log.count("level=WARN"); got != 2 {
		t.Errorf("%d warnings after it was settled and came back, want 2", got)
	}
}

// TestOnlyWhatChangedIsRead: among many files a change costs a look at each one's
// inode, and the reading of one. One that was written a moment before it was read is
// read again, since a second write may leave the inode as it was.
func TestOnlyWhatChangedIsRead(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, age time.Duration) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(-age)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	namespace := func(name string) string { return "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + name + "}\n" }
	write("old.yaml", namespace("old"), time.Hour)
	write("new.yaml", namespace("new"), 0)
	w, err := NewWatcher(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.scan(time.Now(), true)
	for _, step := range []struct {
		what, name, text string
		age              time.Duration
		reads            int
	}{
		{"nothing has changed", "", "", 0, 1},
		{"an old file has another time", "old.yaml", namespace("old"), time.Minute, 2},
		{"another size", "old.yaml", namespace("older"), time.Minute, 2},
		{"the young one has aged", "new.yaml", namespace("new"), time.Minute, 1},
		{"nothing has changed again", "", "", 0, 0},
	} {
		if step.name != "" {
			write(step.name, step.text, step.age)
		}
		before := w.reads
		w.scan(time.Now().Add(time.Minute), false)
		if got := w.reads - before; got != step.reads {
			t.Errorf("%s: %d files were read, want %d", step.what, got, step.reads)
		}
	}
	if w.state.objs.Namespaces["older"] == nil || w.state.objs.Namespaces["new"] == nil {
		t.Errorf("what is known: %v", w.state.objs.Namespaces)
	}
}
