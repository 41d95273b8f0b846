package cni

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/policycache"
)

// file writes a result as containerd's libcni does, shortened by what isn't read.
func file(namespace, name, uid string, addrs ...string) string {
	var ips []string
	for _, a := range addrs {
		ips = append(ips, fmt.Sprintf(`{"address":%q,"interface":1,"version":"4"}`, a))
	}
	return fmt.Sprintf(`{"kind":"cniCacheV1","containerId":"0860","config":"eyJ9","ifName":"eth0","networkName":"pc",
"cniArgs":[["IgnoreUnknown","1"],["K8S_POD_NAMESPACE",%q],["K8S_POD_NAME",%q],["K8S_POD_UID",%q]],
"result":{"cniVersion":"0.4.0","interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/var/run/netns/cni-1"}],"ips":[%s]}}`,
		namespace, name, uid, strings.Join(ips, ","))
}

func TestParse(t *testing.T) {
	pod := file("default", "db", "u1", "10.244.1.2/24", "fd00:244:1::2/64")
	for _, row := range []struct{ name, text, want string }{
		{"a pod of two families", pod, "default/db u1 [10.244.1.2 fd00:244:1::2]"},
		{"4-in-6", file("a", "b", "", "::ffff:10.0.0.1/120"), "a/b  [10.0.0.1]"},
		{"the same twice", file("a", "b", "u", "10.0.0.1/24", "10.0.0.1/32"), "a/b u [10.0.0.1]"},
		{"an address on the node's side", strings.ReplaceAll(pod, `"interface":1`, `"interface":0`), "default/db u1 []"},
		{"an interface that isn't there", strings.ReplaceAll(pod, `"interface":1`, `"interface":-7`), "default/db u1 [10.244.1.2 fd00:244:1::2]"},
		{"no interface named", strings.ReplaceAll(pod, `"interface":1,`, ``), "default/db u1 [10.244.1.2 fd00:244:1::2]"},
		{"loopback", strings.ReplaceAll(pod, `"ifName":"eth0"`, `"ifName":"lo"`), "nothing"},
		{"another kind", strings.ReplaceAll(pod, "cniCacheV1", "cniCacheV9"), "nothing"},
		{"no pod", strings.ReplaceAll(pod, "K8S_POD_NAME", "X"), "nothing"},
		{"an empty object", "{}", "nothing"},
		{"half written", pod[:len(pod)/2], "error"},
		{"empty", "", "error"},
		{"no address", file("a", "b", "u", "10.0.0.256/24"), "error"},
		{"no prefix", file("a", "b", "u", "10.0.0.1"), "error"},
	} {
		got := "nothing"
		if r, err := parse([]byte(row.text)); err != nil {
			got = "error"
		} else if r != nil {
			got = fmt.Sprint(r.key(), " ", r.uid, " ", r.addrs)
		}
		if got != row.want {
			t.Errorf("%s: %s, want %s", row.name, got, row.want)
		}
	}
}

// FuzzParse: whatever is in the file, nothing panics, and no address is made up.
func FuzzParse(f *testing.F) {
	f.Add([]byte(file("default", "db", "u1", "10.244.1.2/24", "fd00:244:1::2/64")))
	f.Add([]byte(`{"kind":"cniCacheV1","ifName":"eth0","cniArgs":[["K8S_POD_NAMESPACE"],["K8S_POD_NAME","x"]]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parse(b)
		if r == nil {
			return
		}
		if err != nil {
			t.Errorf("both a result and %v", err)
		}
		for _, a := range r.addrs {
			if !a.IsValid() || a.Is4In6() {
				t.Errorf("address %v", a)
			}
		}
	})
}

func pod(key, uid string, change func(*policycache.Pod), addrs ...string) *policycache.Pod {
	namespace, name, _ := strings.Cut(key, "/")
	p := &policycache.Pod{Namespace: namespace, Name: name, UID: uid, Node: "here"}
	for _, a := range addrs {
		p.IPs = append(p.IPs, netip.MustParseAddr(a))
	}
	if change != nil {
		change(p)
	}
	return p
}

// watcher is one that has looked at a directory with these files.
func watcher(t *testing.T, files map[string]string) *Watcher {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		put(t, dir, name, text)
	}
	w, err := NewWatcher(dir, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	w.lookAtAll()
	return w
}

func put(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFill(t *testing.T) {
	w := watcher(t, map[string]string{
		"new": file("default", "new", "u1", "10.0.0.1/24", "fd00::1/64"), "known": file("default", "known", "u2", "10.0.0.2/24"),
		"half": file("default", "half", "u3", "10.0.0.3/24", "fd00::3/64"), "other": file("default", "other", "u4", "10.0.0.4/24"),
		"afar": file("default", "afar", "u5", "10.0.0.5/24"), "host": file("default", "host", "u6", "10.0.0.6/24"),
		"anon": file("default", "anon", "", "10.0.0.7/24"), "gone": file("default", "gone", "u8", "10.0.0.8/24"),
		"broken": "{", "lo": strings.Replace(file("default", "new", "u1", "127.0.0.1/8"), "eth0", "lo", 1),
	})
	o := policycache.NewObjects()
	for _, p := range []*policycache.Pod{
		pod("default/new", "u1", nil),
		pod("default/known", "u2", nil, "10.0.0.2"),
		pod("default/half", "u3", nil, "10.0.0.3"),
		pod("default/other", "another", nil),
		pod("default/afar", "u5", func(p *policycache.Pod) { p.Node = "there" }),
		pod("default/host", "u6", func(p *policycache.Pod) { p.HostNetwork = true }),
		pod("default/anon", "u7", nil),
		pod("default/unheard", "u9", nil),
	} {
		o.Pods[p.Key()] = p
	}
	got := w.Fill(o, "here")
	for key, want := range map[string]string{
		"default/new": "[10.0.0.1 fd00::1]", "default/known": "[10.0.0.2]", "default/half": "[10.0.0.3 fd00::3]", "default/other": "[]",
		"default/afar": "[]", "default/host": "[]", "default/anon": "[10.0.0.7]", "default/unheard": "[]",
	} {
		if now := fmt.Sprint(got.Pods[key].IPs); now != want {
			t.Errorf("%s has %s, want %s", key, now, want)
		}
	}
	if len(got.Pods) != len(o.Pods) || len(o.Pods["default/new"].IPs) != 0 {
		t.Error("what was given has changed")
	}
	if again := w.Fill(o, "here"); again.Pods["default/new"] != got.Pods["default/new"] {
		t.Error("a pod that hasn't changed is another object")
	}
	o.Pods["default/new"] = pod("default/new", "u1", nil, "10.0.0.1", "fd00::1")
	delete(o.Pods, "default/half")
	delete(o.Pods, "default/anon")
	w.Fill(o, "here")
	if again := w.Fill(o, "here"); reflect.ValueOf(again.Pods).Pointer() != reflect.ValueOf(o.Pods).Pointer() {
		t.Error("nothing is to add, but the pods are others")
	}
}

// TestFillNamesWhatChanges: a source that names what has changed doesn't know of the
// results, so that Fill has to name the pods that it makes, and makes no more.
func TestFillNamesWhatChanges(t *testing.T) {
	w := watcher(t, map[string]string{"db": file("default", "db", "u", "10.0.0.1/24")})
	o := policycache.NewObjects()
	o.Pods["default/db"] = pod("default/db", "u", nil)
	o.Changed = &policycache.Changed{Pods: []string{"default/web"}}
	for _, step := range []struct{ name, want, file string }{
		{"the first time", "[default/web default/db]", ""},
		{"nothing is new", "[default/web]", ""},
		{"another address", "[default/web default/db]", file("default", "db", "u", "10.0.0.2/24")},
		{"nothing is new again", "[default/web]", ""},
		{"the result is gone", "[default/web default/db]", "-"},
		{"and stays gone", "[default/web]", ""},
	} {
		switch step.file {
		case "":
		case "-":
			if err := os.Remove(filepath.Join(w.dir, "db")); err != nil {
				t.Fatal(err)
			}
		default:
			put(t, w.dir, "db", step.file)
		}
		w.lookAtAll()
		if got := fmt.Sprint(w.Fill(o, "here").Changed.Pods); got != step.want {
			t.Errorf("%s: changed are %s, want %s", step.name, got, step.want)
		}
	}
	if len(o.Changed.Pods) != 1 {
		t.Error("what was given has changed")
	}
}

// TestNewestSandbox: when a pod's sandbox has been replaced, the newer result counts.
func TestNewestSandbox(t *testing.T) {
	w := watcher(t, map[string]string{"a": file("default", "db", "u", "10.0.0.1/24"), "b": file("default", "db", "u", "10.0.0.2/24")})
	for i, name := range []string{"b", "a"} {
		at := time.Now().Add(time.Duration(i+1) * time.Hour)
		if err := os.Chtimes(filepath.Join(w.dir, name), at, at); err != nil {
			t.Fatal(err)
		}
		w.lookAtAll()
		o := policycache.NewObjects()
		o.Pods["default/db"] = pod("default/db", "u", nil)
		if got, want := fmt.Sprint(w.Fill(o, "here").Pods["default/db"].IPs), map[string]string{"a": "[10.0.0.1]", "b": "[10.0.0.2]"}[name]; got != want {
			t.Errorf("with %s written last the pod has %s, want %s", name, got, want)
		}
	}
}

// TestRun follows files as they come, half and whole, and go.
func TestRun(t *testing.T) {
	w := watcher(t, map[string]string{"a": file("default", "a", "u1", "10.0.0.1/24")})
	w.files = map[string]*result{} // as before the first look
	ctx, cancel := context.WithCancel(t.Context())
	changed, ended := make(chan struct{}, 100), make(chan struct{})
	go func() {
		w.Run(ctx, func() { changed <- struct{}{} })
		close(ended)
	}()
	await := func(what string, want ...string) {
		t.Helper()
		for end := time.After(10 * time.Second); ; {
			select {
			case <-changed:
			case <-end:
				t.Fatalf("waited in vain until %s", what)
			}
			w.mu.Lock()
			var got []string
			for key, r := range w.newest() {
				got = append(got, fmt.Sprint(key, r.addrs))
			}
			w.mu.Unlock()
			slices.Sort(got)
			if slices.Equal(got, want) {
				return
			}
		}
	}
	await("the first is read", "default/a[10.0.0.1]")
	b := file("default", "b", "u2", "10.0.0.2/24")
	put(t, w.dir, "b", b)
	await("the second is", "default/a[10.0.0.1]", "default/b[10.0.0.2]")
	c := file("default", "c", "u3", "10.0.0.3/24")
	put(t, w.dir, "c", c[:60])
	put(t, w.dir, "c", c)
	await("a file is whole", "default/a[10.0.0.1]", "default/b[10.0.0.2]", "default/c[10.0.0.3]")
	for _, name := range []string{"a", "b"} {
		if err := os.Remove(filepath.Join(w.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	await("two have gone", "default/c[10.0.0.3]")
	put(t, w.dir, "new.tmp", file("default", "d", "u4", "10.0.0.4/24"))
	await("one more is there", "default/c[10.0.0.3]", "default/d[10.0.0.4]")
	if w.Count() != 2 {
		t.Errorf("%d pods are known, want 2", w.Count())
	}
	cancel()
	<-ended
}

// TestLinks: a pod's interfaces on the node's side are those without a sandbox.
func TestLinks(t *testing.T) {
	w := watcher(t, map[string]string{
		"routed":  file("default", "a", "u1", "10.0.0.1/24"),
		"bridged": strings.Replace(file("default", "b", "u2", "10.0.0.2/24"), `{"name":"veth1"}`, `{"name":"cni0"},{"name":"veth2"},{}`, 1),
		"silent":  strings.Replace(file("default", "c", "", "10.0.0.3/24"), `{"name":"veth1"},`, ``, 1),
	})
	if got, want := fmt.Sprint(w.Links()), "map[{default/a u1}:[veth1] {default/b u2}:[cni0 veth2] {default/c }:[]]"; got != want {
		t.Errorf("links %s, want %s", got, want)
	}
}

func TestNoDirectory(t *testing.T) {
	_, err := NewWatcher(filepath.Join(t.TempDir(), "missing"), slog.Default())
	if err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a directory that isn't there: %v", err)
	}
}
