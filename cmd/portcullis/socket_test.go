package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestListenSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made", "agent.sock")
	first, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := listenSocket(path); err == nil || !strings.Contains(err.Error(), "another agent answers there") {
		t.Errorf("a second agent: %v", err)
	}
	if err := first.Close(); err != nil { // as if it had been killed: the file stays
		t.Fatal(err)
	}
	second, err := listenSocket(path)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	defer second.Close()
	if err := first.remove(); err != nil {
		t.Error(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the first one took the second one's away: %v", err)
	}
	conn.Close()
	if err := second.remove(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestSocketModeFromTheStart looks at the socket's place all the while it is made again
// and again: whenever there is one it is its owner's alone.
func TestSocketModeFromTheStart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	done := make(chan struct{})
	var looking sync.WaitGroup
	seen := 0
	looking.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if info, err := os.Stat(path); err == nil {
				if seen++; info.Mode() != os.ModeSocket|0o600 {
					t.Errorf("mode %s", info.Mode())
					return
				}
			}
		}
	})
	for range 200 {
		s, err := listenSocket(path)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	close(done)
	looking.Wait()
	if seen == 0 {
		t.Error("it was never seen")
	}
}

// A file that isn't a socket, and one that can't be talked to, stay as they are.
func TestListenSocketRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(file, "agent.sock"), filepath.Join(dir, strings.Repeat("x", 200)), file} {
		if s, err := listenSocket(path); err == nil {
			s.Close()
			t.Errorf("%s: no error", path)
		}
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "mine" {
		t.Errorf("the file is %q, %v", text, err)
	}
}
