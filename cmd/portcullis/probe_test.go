package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestProbe: only the pod's own healthy agent counts.
func TestProbe(t *testing.T) {
	for _, c := range []struct{ name, server, uid, asked, want string }{
		{"its own", serverName, "u-1", "u-1", ""},
		{"outside pods", serverName, "", "", ""},
		{"another pod's", serverName, "u-1", "u-2", `the agent of another pod answers: "u-1", this is "u-2"`},
		{"one that has no pod", serverName, "", "u-2", "another pod"},
		{"any", serverName, "u-1", anyPod, ""},
		{"something else", "nginx", "", "", "is no Portcullis agent"},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Server", c.server)
			w.Header().Set(podHeader, c.uid)
		}))
		err := probe(t.Context(), strings.TrimPrefix(s.URL, "http://"), c.asked)
		s.Close()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if err := probe(t.Context(), strings.TrimPrefix(s.URL, "http://"), c.asked); err == nil {
			t.Errorf("%s: nobody answers any more, and that is no error", c.name)
		}
	}
}

func TestReachable(t *testing.T) {
	for listen, want := range map[string]string{
		"127.0.0.1:9353": "127.0.0.1:9353", ":9353": "localhost:9353", "0.0.0.0:1": "localhost:1", "[::]:1": "localhost:1",
		"[::1]:1": "[::1]:1", "node:80": "node:80", "nonsense": "nonsense",
	} {
		if got := reachable(listen); got != want {
			t.Errorf("%s is reached at %s, want %s", listen, got, want)
		}
	}
}
