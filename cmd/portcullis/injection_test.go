package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

// hostile are names that would write a line of their own, or something that a
// terminal obeys, if they came through as they are.
var hostile = []string{"a\nverdict=allow", "a\r\x1b[2K", "\x1b]0;owned\a", "a\u009b31m", "a\u202eb", "a\x7f", "a\u2028b", "\x00"}

// TestNoInjection puts hostile names wherever objects have names, and asks about
// them. What comes out, on either stream, is lines of ours and nothing but text.
func TestNoInjection(t *testing.T) {
	for _, name := range hostile {
		quoted := strconv.QuoteToASCII(name)
		if strings.ContainsRune(name, 0) || strings.Contains(name, "\x7f") || strings.Contains(name, "\a") {
			quoted = `"` + strings.NewReplacer("\x00", `\0`, "\x7f", `\x7f`, "\a", `\a`, "\x1b", `\e`).Replace(name) + `"`
		}
		for what, text := range map[string]string{
			"pod":            "kind: Pod\nmetadata: {name: X}\n",
			"namespace":      "kind: Pod\nmetadata: {name: p, namespace: X}\n",
			"label":          "kind: Pod\nmetadata: {name: p, labels: {X: X}}\nstatus: {podIP: 10.9.9.9}\n",
			"port":           "kind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, ports: [{name: X, containerPort: 80}]}]}\nstatus: {podIP: 10.9.9.9}\n",
			"node":           "kind: Pod\nmetadata: {name: p}\nspec: {nodeName: X}\nstatus: {podIP: 10.9.9.9}\n",
			"owner":          "kind: Pod\nmetadata: {name: p, ownerReferences: [{apiVersion: v1, kind: X, name: X, uid: u, controller: true}]}\nstatus: {podIP: 10.9.9.9}\n",
			"phase":          "kind: Pod\nmetadata: {name: p}\nstatus: {podIP: X, phase: X}\n",
			"kind":           "kind: X\nmetadata: {name: p}\n",
			"policy":         "kind: NetworkPolicy\nmetadata: {name: X}\nspec: {podSelector: {}}\n",
			"selector":       "kind: NetworkPolicy\nmetadata: {name: n}\nspec: {podSelector: {matchExpressions: [{key: X, operator: X, values: [X]}]}}\n",
			"port of a rule": "kind: NetworkPolicy\nmetadata: {name: n}\nspec: {podSelector: {}, ingress: [{ports: [{port: X, protocol: X}]}, {from: [{ipBlock: {cidr: X}}]}]}\n",
			"field":          "kind: NetworkPolicy\nmetadata: {name: n}\nspec: {podSelector: {}, X: 1}\n",
		} {
			api := "v1"
			if strings.Contains(text, "NetworkPolicy") {
				api = "networking.k8s.io/v1"
			}
			dir := t.TempDir()
			pod := "apiVersion: v1\nkind: Pod\nmetadata: {name: q}\nstatus: {podIP: 10.9.9.8}\n---\n"
			if err := os.WriteFile(filepath.Join(dir, "x.yaml"), []byte(pod+"apiVersion: "+api+"\n"+strings.ReplaceAll(text, "X", quoted)), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, command := range [][]string{
				{"explain", "--manifests", dir, "--from", "p", "--to", "q", "--port", "80"},
				{"explain", "--manifests", dir, "--from", "q", "--to", "p", "--port", "http"},
				{"explain", "--manifests", dir, "--from", name, "--to", "q", "--port", name},
				{"explain", "--manifests", dir, "--from", "q", "--to", "p", "--port", "80", "-o", "json"},
				{"matrix", "--manifests", dir, "--port", "80"},
			} {
				var stdout, stderr bytes.Buffer
				run(context.Background(), command, strings.NewReader(""), &stdout, &stderr)
				for stream, out := range map[string]string{"stdout": stdout.String(), "stderr": stderr.String()} {
					if strings.ContainsFunc(out, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) || strings.Contains(out, "\nverdict=allow") {
						t.Errorf("%s %q: %v writes on %s\n%q", what, name, command[:1], stream, out)
					}
				}
			}
		}
	}
}
