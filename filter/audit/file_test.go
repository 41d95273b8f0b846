package audit

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A file that was renamed goes on until it is opened anew; if that fails, too.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log", "decisions")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(FileConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "one\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "two\n")
	if err := f.Reopen(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "three\n")
	if err := os.Rename(filepath.Dir(path), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if err := f.Reopen(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a directory that has gone: %v", err)
	}
	io.WriteString(f, "four\n")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"decisions.1": "one\ntwo\n", "decisions": "three\nfour\n"} {
		if b, err := os.ReadFile(filepath.Join(dir, "away", name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

func TestOpenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "decisions")
	for _, s := range []string{"one\n", "two\n"} {
		w, err := OpenFile(FileConfig{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, s); err != nil || w.Close() != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	info, _ := os.Stat(path)
	if err != nil || string(b) != "one\ntwo\n" || info.Mode().Perm() != 0o600 {
		t.Errorf("%q, %v, %v", b, info.Mode(), err)
	}
	if _, err := OpenFile(FileConfig{Path: filepath.Join(path, "below")}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a path that can't be: %v", err)
	}
}
