package whatif

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/policycache"
	"portcullis/policycache/manifest"
)

// world reads a cluster out of lines: "pod NS/NAME IP,IP key=value ..." and
// "policy NS/NAME SPEC", the spec in JSON or YAML's flow style.
func world(t *testing.T, text string) *policycache.Objects {
	t.Helper()
	var docs []string
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		ns, name, _ := strings.Cut(words[1], "/")
		switch words[0] {
		case "pod":
			docs = append(docs, podDocument(ns, name, words[2], words[3:]))
		case "policy":
			docs = append(docs, fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", ns, name, strings.Join(words[2:], " ")))
		default:
			t.Fatalf("what is %q?", line)
		}
	}
	path := filepath.Join(t.TempDir(), "world.yaml")
	if err := os.WriteFile(path, []byte(strings.Join(docs, "---\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := manifest.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// podDocument writes a pod on node n1; of its words "phase=X" and "host=true"
// aren't labels, and "-" stands for no address.
func podDocument(ns, name, ips string, words []string) string {
	var labels, addrs []string
	phase, host := "Running", "false"
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "phase":
			phase = v
		case "host":
			host = v
		default:
			labels = append(labels, fmt.Sprintf("%s: %q", k, v))
		}
	}
	for _, ip := range strings.Split(ips, ",") {
		if ip != "-" {
			addrs = append(addrs, fmt.Sprintf("{ip: %q}", ip))
		}
	}
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {namespace: %s, name: %q, labels: {%s}}\nspec: {nodeName: n1, hostNetwork: %s, containers: []}\nstatus: {phase: %s, podIPs: [%s]}\n",
		ns, name, strings.Join(labels, ", "), host, phase, strings.Join(addrs, ", "))
}

// conn is a record in words: "VERDICT/REASON DIRECTIONS SRC DST PROTOCOL PORT",
// an end being IP or IP=NS/POD. Directions are "e", "i", "ei" or "-"; in capital
// letters the side was isolated. A reason that ends in "!" is an observed one's. A port of "-" is none.
func conn(t *testing.T, words string) string {
	t.Helper()
	w := strings.Fields(words)
	if len(w) < 6 {
		t.Fatalf("%q has too few words", words)
	}
	r := Record{Directions: []string{}, Protocol: w[4], Src: connEnd(w[2]), Dst: connEnd(w[3])}
	r.Verdict, r.Reason, _ = strings.Cut(w[0], "/")
	r.Reason, r.Observed = strings.CutSuffix(r.Reason, "!")
	for _, c := range strings.Trim(w[1], "-") {
		side := &Side{Verdict: r.Verdict, Isolated: c < 'a', Policies: []string{}}
		if c == 'e' || c == 'E' {
			r.Directions, r.Egress = append(r.Directions, egress), side
		} else {
			r.Directions, r.Ingress = append(r.Directions, ingress), side
		}
	}
	var port uint16
	if _, err := fmt.Sscan(w[5], &port); err == nil {
		if strings.HasPrefix(w[4], "ICMP") {
			kind := uint8(port)
			r.ICMPType, r.ICMPCode = &kind, new(uint8)
		} else {
			r.Dst.Port = &port
		}
	}
	if len(w) > 6 {
		if _, err := fmt.Sscan(w[6], &r.Count); err != nil {
			t.Fatalf("%q: %v", words, err)
		}
	}
	line, err := json.Marshal(&r)
	if err != nil {
		t.Fatal(err)
	}
	// A record without a time.
	return strings.Replace(string(line), `"time":"0001-01-01T00:00:00Z",`, "", 1)
}

func connEnd(word string) RecordEnd {
	ip, pod, _ := strings.Cut(word, "=")
	ns, name, _ := strings.Cut(pod, "/")
	return RecordEnd{IP: strings.Trim(ip, "-"), Namespace: ns, Pod: name}
}

func readAll(t *testing.T, use func(*Record), conns ...string) {
	t.Helper()
	var log bytes.Buffer
	for _, words := range conns {
		log.WriteString(conn(t, words) + "\n")
	}
	_, err := Read(&log, use, func(line int, err error) { t.Errorf("line %d: %v", line, err) })
	if err != nil {
		t.Fatal(err)
	}
}
