package manifest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/policycache"
)

// randomFile is what a file may hold: few names, so that files give the same objects.
func randomFile(r *rand.Rand) *policycache.Objects {
	o := policycache.NewObjects()
	name := func() string { return string('a' + rune(r.IntN(4))) }
	label := func() map[string]string { return map[string]string{"v": fmt.Sprint(r.IntN(2))} }
	for range r.IntN(4) {
		switch r.IntN(4) {
		case 0:
			p := &policycache.Pod{Namespace: name(), Name: name(), Labels: label()}
			o.Pods[p.Key()] = p
		case 1:
			n := &policycache.Namespace{Name: name(), Labels: label()}
			o.Namespaces[n.Name] = n
		case 2:
			n := &policycache.Node{Name: name()}
			o.Nodes[n.Name] = n
		case 3:
			np := &networkingv1.NetworkPolicy{}
			np.Namespace, np.Name = name(), name()
			np.Spec.PodSelector.MatchLabels = label()
			o.Policies[np.Namespace+"/"+np.Name] = np
		}
	}
	return o
}

// TestMergeEqualsUnion changes, adds and removes files by chance and holds the state
// that is kept by difference against the union of all files: the same objects, those
// that are equal by the same pointer as before, all differences named, and each
// doubled object told once for as long as it is.
func TestMergeEqualsUnion(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	m, files, told := newMerger(), map[string]*policycache.Objects{}, map[doubled]bool{}
	for step := range 5000 {
		before := *m.objs
		frozen := policycache.Objects{Pods: maps.Clone(before.Pods), Namespaces: maps.Clone(before.Namespaces), Nodes: maps.Clone(before.Nodes), Policies: maps.Clone(before.Policies)}
		for range 1 + r.IntN(2) {
			name := fmt.Sprint(r.IntN(5))
			was, now := files[name], randomFile(r)
			if r.IntN(4) == 0 {
				now = nil
			}
			m.replace(name, was, now)
			if files[name] = now; now == nil {
				delete(files, name)
			}
		}
		first := !m.taken
		changed, fresh := m.settle()
		var parts []part
		for _, name := range slices.Sorted(maps.Keys(files)) {
			parts = append(parts, part{name, files[name]})
		}
		want, twice := union(parts)
		checkLayer(t, first, step, "pods", frozen.Pods, before.Pods, m.objs.Pods, want.Pods, changedOf(m, func(c *policycache.Changed) []string { return c.Pods }))
		checkLayer(t, first, step, "namespaces", frozen.Namespaces, before.Namespaces, m.objs.Namespaces, want.Namespaces, changedOf(m, func(c *policycache.Changed) []string { return c.Namespaces }))
		checkLayer(t, first, step, "nodes", frozen.Nodes, before.Nodes, m.objs.Nodes, want.Nodes, changedOf(m, func(c *policycache.Changed) []string { return c.Nodes }))
		checkLayer(t, first, step, "policies", frozen.Policies, before.Policies, m.objs.Policies, want.Policies, changedOf(m, func(c *policycache.Changed) []string { return c.Policies }))
		same := maps.Equal(before.Pods, m.objs.Pods) && maps.Equal(before.Namespaces, m.objs.Namespaces) && maps.Equal(before.Nodes, m.objs.Nodes) && maps.Equal(before.Policies, m.objs.Policies)
		if changed == same {
			t.Errorf("step %d: changed %t", step, changed)
		}
		now := map[doubled]bool{}
		for _, d := range twice {
			now[d] = true
			if !told[d] && !slices.Contains(fresh, d) {
				t.Errorf("step %d: %s: not told", step, d)
			}
		}
		for _, d := range fresh {
			if told[d] || !now[d] {
				t.Errorf("step %d: %s: told again, or isn't so", step, d)
			}
		}
		told = now
		if t.Failed() {
			t.FailNow()
		}
	}
}

func changedOf(m *merger, of func(*policycache.Changed) []string) []string {
	if m.objs.Changed == nil {
		return nil
	}
	return of(m.objs.Changed)
}

func checkLayer[T any](t *testing.T, first bool, step int, kind string, frozen, before, now, want map[string]*T, named []string) {
	t.Helper()
	if !reflect.DeepEqual(now, want) {
		t.Errorf("step %d: %s: %v, want %v", step, kind, now, want)
	}
	if !maps.Equal(frozen, before) {
		t.Errorf("step %d: %s: a state that was handed over has changed", step, kind)
	}
	for key, was := range before {
		is := now[key]
		if is != nil && is != was && reflect.DeepEqual(is, was) {
			t.Errorf("step %d: %s: %s is equal, and another object", step, kind, key)
		}
		if is != was && !first && !slices.Contains(named, key) {
			t.Errorf("step %d: %s: %s isn't named", step, kind, key)
		}
	}
	for key := range now {
		if before[key] == nil && !first && !slices.Contains(named, key) {
			t.Errorf("step %d: %s: %s isn't named", step, kind, key)
		}
	}
}

// TestLookAtNamedFiles: a look at some files finds what has become of them, and nothing
// else; it believes in no file's absence while the directory is gone.
func TestLookAtNamedFiles(t *testing.T) {
	dir := mkdir(t, filepath.Join(t.TempDir(), "manifests"))
	w := newWatch(t, dir)
	write(t, dir, "a.yaml", pod("a", "1"))
	write(t, dir, "b.yaml", pod("b", "1"))
	w.scan()
	if w.w.state.objs.Changed != nil {
		t.Error("the first state names what has changed")
	}
	look := func(want string, names ...string) {
		t.Helper()
		w.w.look(later(), names, false)
		w.state(want)
	}
	write(t, dir, "a.yaml", pod("a", "2"))
	write(t, dir, "b.yaml", pod("b", "2"))
	write(t, dir, "c.yaml", pod("c", "1"))
	look("a=2 b=1", "a.yaml")
	if c := w.w.state.objs.Changed; c == nil || fmt.Sprint(*c) != "{[default/a] [] [] []}" {
		t.Errorf("named as changed: %+v", c)
	}
	look("a=2 b=2 c=1", "b.yaml", "c.yaml", "nobody.yaml")
	remove(t, filepath.Join(dir, "c.yaml"))
	look("a=2 b=2 c=1", "a.yaml")
	look("a=2 b=2", "c.yaml")
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	look("a=2 b=2", "a.yaml", "b.yaml")
	if s := w.w.Status(); s.Errors[dir] == "" || s.Files != 2 {
		t.Errorf("status %+v", s)
	}
	write(t, mkdir(t, dir), "b.yaml", pod("b", "3"))
	w.scan()
	w.state("b=3")
}

// TestConcerned: only manifests count, unless links may lead elsewhere.
func TestConcerned(t *testing.T) {
	for _, c := range []struct {
		links     bool
		name      string
		concerned bool
		want      string
	}{
		{false, "a.yaml", true, "a.yaml true"},
		{false, ".a.yaml.tmp", true, ".a.yaml.tmp false"},
		{false, everything, true, " true"},
		{false, "", false, " false"},
		{true, "a.yaml", true, " true"},
		{true, "target.txt", true, " true"},
		{true, "a.yaml", false, " false"},
	} {
		name, concerned := (&Watcher{links: c.links}).concerned(c.name, c.concerned)
		if got := fmt.Sprintf("%s %t", name, concerned); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
