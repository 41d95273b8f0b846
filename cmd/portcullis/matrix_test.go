package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestMatrixTranscript(t *testing.T) { transcript(t, "testdata/matrix.txtar") }

func TestMatrixUsageErrors(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct{ args, want string }{
		{"", "give --manifests DIR"},
		{"--manifests DIR", "TCP needs a port"},
		{"--manifests DIR --port 1 -o wide", `unknown output "wide"`},
		{"--manifests DIR --port 0", `bad port "0"`},
		{"--manifests DIR --port 1 --protocol GRE", `unknown protocol "GRE"`},
		{"--manifests DIR --port 1 -n nowhere", `there is no namespace "nowhere"`},
		{"--manifests DIR/none --port 1", "no such file"},
	} {
		args := strings.Fields("matrix " + strings.ReplaceAll(tt.args, "DIR", dir))
		stdout, stderr, code := runPure(nil, args...)
		if stdout != "" || code != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, tt.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want %q", tt.args, code, stdout, stderr, tt.want)
		}
	}
}

func TestNoteLeftOut(t *testing.T) {
	for _, tt := range []struct {
		pods int
		want string
	}{
		{0, ""}, {1, "note: left out: pod 0\n"}, {3, "note: left out: pod 0; and 2 more\n"},
	} {
		var all []error
		for i := range tt.pods {
			all = append(all, errors.New(fmt.Sprint("pod ", i)))
		}
		var b strings.Builder
		noteLeftOut(&b, all)
		if b.String() != tt.want {
			t.Errorf("%d pods: %q, want %q", tt.pods, b.String(), tt.want)
		}
	}
}
