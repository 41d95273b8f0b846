package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
)

// TestWrongCommandLines holds that a mistake is told in one line on stderr that
// names it, with exit code 1, before anything is touched.
func TestWrongCommandLines(t *testing.T) {
	for _, row := range []struct{ args, want string }{
		{"agent", "--manifests is missing"},
		{"agent --manifests d", "--node is missing"},
		{"agent --manifests d --node n --queues 0", "at least one queue"},
		{"agent --manifests d --node n --queue-base 65535 --queues 2", "not within 0 to 65535"},
		{"agent --manifests d --node n --queue-base -1", "not within 0 to 65535"},
		{"agent --manifests d --node n --mark-bits 0x1000", "--mark-bits"},
		{"agent --manifests d --node n --mark-bits seven", "--mark-bits"},
		{"agent --manifests d --node n --http nonsense", "not an address"},
		{"agent --manifests d --node n --log-format xml", "text or json"},
		{"agent --manifests d --node n --decision-log-ring 0", "--decision-log-ring"},
		{"agent --manifests d --node n --cache-size -1", "below zero"},
		{"agent --manifests d --node n --iptables-backend ebtables", "ebtables"},
		{"agent --manifests d --node n more", "unknown command"},
		{"agent --no-such-flag", "unknown flag"},
		{"cleanup --mark-bits 0", "--mark-bits"},
		{"no-such-command", "unknown command"},
	} {
		t.Setenv("NODE_NAME", "")
		var stdout, stderr bytes.Buffer
		code := run(context.Background(), strings.Fields(row.args), strings.NewReader(""), &stdout, &stderr)
		line := stderr.String()
		if code != 1 || !strings.Contains(line, row.want) || strings.Count(line, "\n") != 1 || stdout.Len() > 0 {
			t.Errorf("portcullis %s: exit code %d, stderr %q, stdout %q; want one line with %q", row.args, code, line, stdout.String(), row.want)
		}
	}
}

func TestVersion(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(context.Background(), []string{"version"}, nil, &stdout, &stderr); code != 0 || !strings.HasPrefix(stdout.String(), "portcullis ") {
		t.Errorf("version: exit code %d, %q, %q", code, stdout.String(), stderr.String())
	}
}

func TestOneLine(t *testing.T) {
	if got := oneLine(errors.Join(errors.New("a\nb"), errors.New("c"))); got != "a; b; c" {
		t.Errorf("oneLine: %q", got)
	}
}
