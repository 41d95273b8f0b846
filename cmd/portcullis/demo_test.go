package main

import (
	"bytes"
	"io"
	"os"
	"testing"
)

func TestWantsColor(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	file, err := os.Create(t.TempDir() + "/out")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, tt := range []struct {
		name, noColor, term string
		w                   io.Writer
		want                bool
	}{
		{"terminal", "", "xterm", terminal, true},
		{"NO_COLOR", "1", "xterm", terminal, false},
		{"dumb terminal", "", "dumb", terminal, false},
		{"file", "", "xterm", file, false},
		{"buffer", "", "xterm", new(bytes.Buffer), false},
	} {
		env := map[string]string{"NO_COLOR": tt.noColor, "TERM": tt.term}
		if got := wantsColor(tt.w, func(key string) string { return env[key] }); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
