package manifest

import (
	"maps"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/policycache"
)

// merger keeps the state that files make together, which is what union makes of them
// in the order of their names, and brings it up to date by what a file gives otherwise
// than before: the other files' objects aren't looked at.
type merger struct {
	objs       *policycache.Objects
	pods       layer[policycache.Pod]
	namespaces layer[policycache.Namespace]
	nodes      layer[policycache.Node]
	policies   layer[networkingv1.NetworkPolicy]
	inside     map[string]int // pods and policies of each namespace
	taken      bool           // the state has been handed over
	doubles    map[string][]doubled
}

// layer is what the files give of one kind of objects. The objects that count are in
// the state.
type layer[T any] struct {
	kind    string
	givers  map[string][]giver[T] // by the object's key, sorted by file
	touched map[string]bool       // whose givers have changed since the last settle
}

// giver is a file that gives an object.
type giver[T any] struct {
	file   string
	object *T
}

func newMerger() *merger {
	return &merger{
		objs:       policycache.NewObjects(),
		pods:       newLayer[policycache.Pod]("pod"),
		namespaces: newLayer[policycache.Namespace]("namespace"),
		nodes:      newLayer[policycache.Node]("node"),
		policies:   newLayer[networkingv1.NetworkPolicy]("networkpolicy"),
		inside:     map[string]int{},
		doubles:    map[string][]doubled{},
	}
}

func newLayer[T any](kind string) layer[T] {
	return layer[T]{kind, map[string][]giver[T]{}, map[string]bool{}}
}

// replace puts what a file gives now in the place of what it gave before; nil for
// nothing. Objects that are as before are replaced in now by those of before.
func (m *merger) replace(file string, before, now *policycache.Objects) {
	if before == nil {
		before = &policycache.Objects{}
	}
	if now == nil {
		now = &policycache.Objects{}
	}
	m.pods.replace(file, before.Pods, now.Pods)
	m.namespaces.replace(file, before.Namespaces, now.Namespaces)
	m.nodes.replace(file, before.Nodes, now.Nodes)
	m.policies.replace(file, before.Policies, now.Policies)
}

func (l *layer[T]) replace(file string, before, now map[string]*T) {
	for key, object := range now {
		was := before[key]
		if was != nil && reflect.DeepEqual(was, object) {
			now[key] = was
			continue
		}
		l.touched[key] = true
		list := l.givers[key]
		if at, known := l.find(list, file); known {
			list[at].object = object
		} else {
			l.givers[key] = slices.Insert(list, at, giver[T]{file, object})
		}
	}
	for key := range before {
		if now[key] != nil {
			continue
		}
		l.touched[key] = true
		list := l.givers[key]
		if at, known := l.find(list, file); known {
			list = slices.Delete(list, at, at+1)
		}
		if l.givers[key] = list; len(list) == 0 {
			delete(l.givers, key)
		}
	}
}

func (l *layer[T]) find(list []giver[T], file string) (at int, known bool) {
	return slices.BinarySearchFunc(list, file, func(g giver[T], file string) int { return strings.Compare(g.file, file) })
}

// last gives the object that counts, nil for none.
func (l *layer[T]) last(key string) *T {
	if list := l.givers[key]; len(list) > 0 {
		return list[len(list)-1].object
	}
	return nil
}

// settle brings the state up to date. It tells whether that made it another one, and
// lists what two files give that they didn't when it was last called. All states but
// the first name what has changed.
func (m *merger) settle() (changed bool, twice []doubled) {
	twice = slices.Concat(settleDoubles(m, &m.namespaces), settleDoubles(m, &m.nodes), settleDoubles(m, &m.pods), settleDoubles(m, &m.policies))
	next, names := *m.objs, policycache.Changed{}
	next.Nodes, names.Nodes = settleLayer(&m.nodes, next.Nodes, m.nodes.last, func(string, int) {})
	next.Pods, names.Pods = settleLayer(&m.pods, next.Pods, m.pods.last, m.count)
	next.Policies, names.Policies = settleLayer(&m.policies, next.Policies, m.policies.last, m.count)
	next.Namespaces, names.Namespaces = settleLayer(&m.namespaces, next.Namespaces, m.namespace, func(string, int) {})
	if len(names.Nodes)+len(names.Pods)+len(names.Policies)+len(names.Namespaces) == 0 {
		return false, twice
	}
	if m.taken {
		next.Changed = &names
	}
	m.taken, m.objs = true, &next
	return true, twice
}

// count counts a pod or a policy that has come or gone to its namespace.
func (m *merger) count(key string, by int) {
	namespace, _, _ := strings.Cut(key, "/")
	m.inside[namespace] += by
	if m.inside[namespace] == 0 {
		delete(m.inside, namespace)
	}
	m.namespaces.touched[namespace] = true
}

// namespace gives the namespace that counts: one that no file gives is there all the
// same if something is in it, since a cluster couldn't hold the one without the other.
func (m *merger) namespace(name string) *policycache.Namespace {
	if given := m.namespaces.last(name); given != nil || m.inside[name] == 0 {
		return given
	}
	return impliedNamespace(name)
}

func impliedNamespace(name string) *policycache.Namespace {
	return policycache.NamespaceFrom(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
}

// settleLayer gives the state of one kind after before, and what has changed. An object
// that equals the one of before stays that one, whichever file gives it.
func settleLayer[T any](l *layer[T], before map[string]*T, counts func(string) *T, moved func(key string, by int)) (map[string]*T, []string) {
	var changed []string
	now := before
	for key := range l.touched {
		was, is := before[key], counts(key)
		if was == is {
			continue
		}
		if was != nil && is != nil && reflect.DeepEqual(was, is) {
			if list := l.givers[key]; len(list) > 0 {
				list[len(list)-1].object = was
			}
			continue
		}
		if changed == nil {
			now = maps.Clone(before)
		}
		changed = append(changed, key)
		switch {
		case is == nil:
			delete(now, key)
			moved(key, -1)
		case was == nil:
			now[key] = is
			moved(key, 1)
		default:
			now[key] = is
		}
	}
	clear(l.touched)
	return now, changed
}

// settleDoubles finds what two files give among what they touched, and gives what is
// new of it.
func settleDoubles[T any](m *merger, l *layer[T]) (fresh []doubled) {
	for key := range l.touched {
		object := l.kind + " " + key
		var now []doubled
		list := l.givers[key]
		for i := 1; i < len(list); i++ {
			now = append(now, doubled{object, list[i-1].file, list[i].file})
		}
		for _, d := range now {
			if !slices.Contains(m.doubles[object], d) {
				fresh = append(fresh, d)
			}
		}
		if m.doubles[object] = now; now == nil {
			delete(m.doubles, object)
		}
	}
	return fresh
}
