package policycache_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"portcullis/policycache"
	"portcullis/verdict"
)

// incrementalChanges is how many random changes a compiler lives through.
const incrementalChanges = 10_000

// TestIncrementalEqualsFresh lets two compilers, one of a node and one of all,
// live through thousands of changes of all kinds, conflicts and mistakes among
// them, now with word about what has changed and now without, and compares with
// fresh compilers on the way, again and again.
func TestIncrementalEqualsFresh(t *testing.T) {
	for i, node := range []string{"", "n1"} {
		t.Run("node="+node, func(t *testing.T) {
			t.Parallel()
			d := newDice(uint64(77 + i))
			d.modes = true
			r := newRig(node)
			o := d.town(30)
			r.engine.Swap(r.compiler.Compile(o))
			for change := range incrementalChanges / 2 {
				next := d.mutate(o)
				if d.pct(2) {
					next = d.town(30) // nothing stays
				}
				if d.pct(60) {
					next.Changed = changedBetween(o, next)
					next.Changed.Pods = append(next.Changed.Pods, "a/pod1", "a/nobody", "a/pod1")
				}
				o = next
				if !d.pct(50) {
					r.engine.Swap(r.compiler.Compile(o))
					continue
				}
				if bad := r.compareFresh(d, o); bad != "" {
					t.Fatalf("after %d changes: %s", change+1, bad)
				}
			}
			if r.hits == 0 {
				t.Error("no decision came from a cache: the caches weren't tried")
			}
		})
	}
}

// town draws a cluster in which pods are many enough to be alike, and in which
// some tables are wide.
func (d *dice) town(pods int) *policycache.Objects {
	o := d.cluster()
	if d.pct(50) {
		o = d.crowd(12)
	}
	for i := range pods {
		p := d.pod(pick(d, genNamespaces...), fmt.Sprintf("pod%d", i))
		o.Pods[p.Key()] = p
	}
	return o
}

// changedBetween names the objects that differ between two states.
func changedBetween(a, b *policycache.Objects) *policycache.Changed {
	return &policycache.Changed{
		Pods: changedKeys(a.Pods, b.Pods), Namespaces: changedKeys(a.Namespaces, b.Namespaces),
		Nodes: changedKeys(a.Nodes, b.Nodes), Policies: changedKeys(a.Policies, b.Policies),
	}
}

func changedKeys[T any](a, b map[string]*T) []string {
	all := maps.Clone(a)
	maps.Copy(all, b)
	var keys []string
	for key := range all {
		if a[key] != b[key] {
			keys = append(keys, key)
		}
	}
	return keys
}

// compareFresh compiles a state with the rig's compiler and with a fresh one,
// and says how they differ, if they do.
func (r *rig) compareFresh(d *dice, o *policycache.Objects) string {
	s := r.compiler.Compile(o)
	r.engine.Swap(s)
	compiler := policycache.NewCompiler(r.node, quiet)
	fresh := compiler.Compile(clone(o, false))
	if !slices.Equal(s.IsolatedAddrs(), fresh.IsolatedAddrs()) || !slices.Equal(s.JudgedAddrs(), fresh.JudgedAddrs()) {
		return fmt.Sprintf("isolated %v, judged %v, want %v and %v", s.IsolatedAddrs(), s.JudgedAddrs(), fresh.IsolatedAddrs(), fresh.JudgedAddrs())
	}
	if got, want := fmt.Sprint(r.compiler.Problems()), fmt.Sprint(compiler.Problems()); got != want {
		return fmt.Sprintf("problems %s, want %s", got, want)
	}
	for _, a := range slices.Concat(genAddrs4, genAddrs6, genHosts, genOutside) {
		if got, want := whose(s, a), whose(fresh, a); got != want {
			return fmt.Sprintf("%s is %s, want %s", a, got, want)
		}
	}
	for _, f := range d.flows(o, 12) {
		got, want := s.Decide(&f), fresh.Decide(&f)
		if bad := sameDecision(&got, &want); bad != "" {
			return fmt.Sprintf("flow %+v: %s", f, bad)
		}
		for _, w := range r.workers {
			cached := w.Decide(&f)
			if cached.Cached {
				r.hits++
			}
			if bad := sameDecision(cached, &want); bad != "" {
				return fmt.Sprintf("flow %+v, cached %v: %s", f, cached.Cached, bad)
			}
		}
	}
	return ""
}

func whose(s *verdict.Snapshot, a netip.Addr) string {
	name := "nobody's"
	if e := s.Endpoint(a); e != nil {
		name = fmt.Sprintf("%s on %q, judged %v, isolated %v, %v %v", e.Key(), e.Node, e.Judged, e.Isolated(), e.Addrs, e.Ports)
	}
	return fmt.Sprintf("%s and node %q's", name, s.Node(a))
}

// sameDecision compares verdicts and the whole of why.
func sameDecision(got, want *verdict.Decision) string {
	if got, want := answerOf(got), answerOf(want); got != want {
		return fmt.Sprintf("%+v, want %+v", got, want)
	}
	return ""
}
