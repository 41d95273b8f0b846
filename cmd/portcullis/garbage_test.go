package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestGCPercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 1200, 1 << 20: 1200, 6 << 20: 200, 12 << 20: 100, 24 << 20: 50, 48 << 20: 25, 1 << 30: 25} {
		if got := gcPercent(live); got != want {
			t.Errorf("%d MiB in use: %d %%, want %d", live>>20, got, want)
		}
	}
}

// TestBoundGarbage: the collector is set by what is in use, again and again.
func TestBoundGarbage(t *testing.T) {
	if value, set := os.LookupEnv("GOGC"); set {
		t.Setenv("GOGC", value) // puts it back
		os.Unsetenv("GOGC")
	}
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	boundGarbage()
	percent := func() int {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return p
	}
	var held []byte
	for _, size := range []int{64 << 20, 1 << 20} {
		held = make([]byte, size)
		runtime.GC()
		ok := func() bool { p := percent(); return size > 1<<20 && p <= 30 || size == 1<<20 && p > 100 }
		for end := time.Now().Add(10 * time.Second); !ok() && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			runtime.GC()
		}
		if !ok() {
			t.Errorf("with %d MiB in use GOGC is %d", size>>20, percent())
		}
		runtime.KeepAlive(held)
	}
}
