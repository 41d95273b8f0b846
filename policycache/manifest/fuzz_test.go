package manifest

import (
	"log/slog"
	"strings"
	"testing"
)

// FuzzDecode holds the decoder to never panicking, to giving errors of one
// line, and to objects whose keys and defaults can be relied on.
func FuzzDecode(f *testing.F) {
	log := slog.New(slog.DiscardHandler)
	f.Fuzz(func(t *testing.T, data []byte) {
		objs, errs := decode("fuzz.yaml", data, log)
		for _, err := range errs {
			if text := err.Error(); text == "" || strings.ContainsAny(text, "\n\r") {
				t.Errorf("error %q isn't one line", text)
			}
		}
		for key, p := range objs.Policies {
			if p.Name == "" || key != p.Namespace+"/"+p.Name || len(p.Spec.PolicyTypes) == 0 {
				t.Errorf("policy %q isn't named or defaulted: %+v", key, p)
			}
		}
		for key, p := range objs.Pods {
			if p.Name == "" || p.Namespace == "" || key != p.Key() || strings.Count(key, "/") != 1 {
				t.Errorf("pod %q: %+v", key, p)
			}
		}
		for key, n := range objs.Namespaces {
			if n.Name != key || n.Labels["kubernetes.io/metadata.name"] != key {
				t.Errorf("namespace %q: %+v", key, n)
			}
		}
	})
}
