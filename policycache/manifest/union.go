package manifest

import (
	"fmt"

	"portcullis/policycache"
)

// part is what one file contributes to the state.
type part struct {
	name string
	objs *policycache.Objects
}

// doubled is an object that two files give; the later one in name order counts.
type doubled struct{ object, loser, winner string }

// String gives the warning's text.
func (d doubled) String() string {
	return fmt.Sprintf("%s is in %s and in %s: the one in %s counts", d.object, d.loser, d.winner, d.winner)
}

// union makes one state of the files', which come in name order, as if they
// had been applied in that order.
func union(parts []part) (*policycache.Objects, []doubled) {
	all := policycache.NewObjects()
	owner := map[string]string{}
	var twice []doubled
	for _, p := range parts {
		twice = overlay("namespace", all.Namespaces, p.objs.Namespaces, p.name, owner, twice)
		twice = overlay("node", all.Nodes, p.objs.Nodes, p.name, owner, twice)
		twice = overlay("pod", all.Pods, p.objs.Pods, p.name, owner, twice)
		twice = overlay("networkpolicy", all.Policies, p.objs.Policies, p.name, owner, twice)
	}
	implyNamespaces(all)
	return all, twice
}

func overlay[T any](kind string, all, some map[string]*T, file string, owner map[string]string, twice []doubled) []doubled {
	for key, object := range some {
		name := kind + " " + key
		if loser, ok := owner[name]; ok {
			twice = append(twice, doubled{name, loser, file})
		}
		owner[name] = file
		all[key] = object
	}
	return twice
}

// implyNamespaces adds the namespaces that pods and policies are in and that
// no file gives: a cluster couldn't hold the one without the other.
func implyNamespaces(o *policycache.Objects) {
	imply := func(name string) {
		if o.Namespaces[name] == nil {
			o.Namespaces[name] = impliedNamespace(name)
		}
	}
	for _, p := range o.Pods {
		imply(p.Namespace)
	}
	for _, p := range o.Policies {
		imply(p.Namespace)
	}
}
