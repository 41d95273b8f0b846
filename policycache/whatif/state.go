package whatif

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"portcullis/policycache"
	"portcullis/policycache/explain"
	"portcullis/verdict"
)

// State is a cluster's objects as what-if questions see them, and the policy
// compiled from them. It judges every pod, wherever it runs. It belongs to one
// goroutine.
type State struct {
	objects   *policycache.Objects
	snap      *verdict.Snapshot
	cluster   *explain.Cluster
	problems  []policycache.Problem
	workloads workloads
	ends      map[string]placedEnd // by the pod's "namespace/name" in the log
}

// NewState compiles the objects, which it doesn't change. Namespace is where
// tests look for pods that they name without one; empty means "default".
//
// A pod without an address gets one that nobody has (of 240.0.0.0/4 and
// 100::/64), so that manifests will do that never were in a cluster. So does a
// pod that has finished: who asks about it asks about the time when it ran.
func NewState(o *policycache.Objects, namespace string) *State {
	o = settled(o)
	compiler := policycache.NewCompiler("", slog.New(slog.DiscardHandler))
	snap := compiler.Compile(o)
	return &State{
		objects:   o,
		snap:      snap,
		cluster:   explain.New(o, snap, namespace),
		problems:  compiler.Problems(),
		workloads: newWorkloads(o),
		ends:      map[string]placedEnd{},
	}
}

// Problems lists what is wrong with the objects and doesn't keep questions from
// being answered.
func (s *State) Problems() []policycache.Problem { return s.problems }

// settled gives the objects with an address for each pod that lacks one.
func settled(o *policycache.Objects) *policycache.Objects {
	all := *o
	all.Pods = maps.Clone(o.Pods)
	free := newFreeAddrs(o)
	for _, key := range slices.Sorted(maps.Keys(o.Pods)) {
		p := o.Pods[key]
		if p.HostNetwork || len(p.IPs) > 0 && !p.Ended() {
			continue
		}
		q := *p
		if p.Ended() {
			q.Phase, q.HostIPs = "", nil // its node's address may have moved since
		}
		q.IPs = free.next()
		all.Pods[key] = &q
	}
	return &all
}

// freeAddrs hands out addresses that no pod and no node has.
type freeAddrs struct {
	used   map[netip.Addr]bool
	v4, v6 netip.Addr // handed out last
}

func newFreeAddrs(o *policycache.Objects) *freeAddrs {
	f := &freeAddrs{used: map[netip.Addr]bool{}, v4: netip.MustParseAddr("240.0.0.0"), v6: netip.MustParseAddr("100::")}
	note := func(addrs []netip.Addr) {
		for _, a := range addrs {
			f.used[a] = true
		}
	}
	for _, p := range o.Pods {
		note(p.IPs)
		note(p.HostIPs)
	}
	for _, n := range o.Nodes {
		note(n.Addrs)
	}
	return f
}

func (f *freeAddrs) next() []netip.Addr {
	for f.v4 = f.v4.Next(); f.used[f.v4]; f.v4 = f.v4.Next() {
	}
	for f.v6 = f.v6.Next(); f.used[f.v6]; f.v6 = f.v6.Next() {
	}
	return []netip.Addr{f.v4, f.v6}
}
