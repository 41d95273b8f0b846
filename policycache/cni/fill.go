package cni

import (
	"maps"
	"net/netip"
	"slices"

	"portcullis/policycache"
)

// filled is a pod as Fill has made it, kept so that it is the same object each time
// as long as nothing changes.
type filled struct {
	from  *policycache.Pod
	addrs []netip.Addr
	pod   *policycache.Pod
}

// Fill adds to the node's pods the addresses that their CNI plugins have given them
// and that the API doesn't name yet. It changes nothing that it is given; where there
// is nothing to add, and was nothing before, it gives the pods as they are; where they
// name what has changed, it names the pods too that are others for its sake. Each
// state that it gives has to be taken in by the same compiler. It says which pods have
// which addresses too (Objects.Given), for those that two claim: a dead pod's address
// may be another's before the API has heard of either. Pods of another UID than the
// result's are others by the same name, and a pod with the node's network has no
// address of its own.
func (w *Watcher) Fill(o *policycache.Objects, node string) *policycache.Objects {
	w.mu.Lock()
	defer w.mu.Unlock()
	made := map[string]filled{}
	given := given{}
	for key, r := range w.newest() {
		pod := o.Pods[key]
		if pod == nil || pod.Node != node || pod.HostNetwork || (r.uid != "" && r.uid != pod.UID) {
			continue
		}
		given.note(key, r)
		addrs := slices.Clone(pod.IPs)
		for _, a := range r.addrs {
			if !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
		if len(addrs) == len(pod.IPs) {
			continue
		}
		if old, ok := w.made[key]; ok && old.from == pod && slices.Equal(old.addrs, addrs) {
			made[key] = old
			continue
		}
		more := *pod
		more.IPs = addrs
		made[key] = filled{pod, addrs, &more}
	}
	changed := differing(w.made, made)
	w.made = made
	if len(given) == 0 && len(made) == 0 && len(changed) == 0 {
		return o
	}
	whole := *o
	whole.Given = given.pods()
	if len(made) == 0 && len(changed) == 0 {
		return &whole
	}
	if o.Changed != nil && len(changed) > 0 {
		more := *o.Changed
		more.Pods = slices.Concat(more.Pods, changed)
		whole.Changed = &more
	}
	whole.Pods = maps.Clone(o.Pods)
	for key, f := range made {
		whole.Pods[key] = f.pod
	}
	return &whole
}

// given are the results that addresses are of: of several that of the pod which was
// given it last, since the removal of another may have been left undone.
type given map[netip.Addr]gift

type gift struct {
	pod string
	by  *result
}

func (g given) note(pod string, r *result) {
	for _, a := range r.addrs {
		if before, ok := g[a]; !ok || r.written.After(before.by.written) {
			g[a] = gift{pod, r}
		}
	}
}

// pods gives the pods' keys by their addresses.
func (g given) pods() map[netip.Addr]string {
	pods := make(map[netip.Addr]string, len(g))
	for a, to := range g {
		pods[a] = to.pod
	}
	return pods
}

// differing lists the pods that were made anew, or aren't made any more.
func differing(before, now map[string]filled) (keys []string) {
	for key, f := range now {
		if before[key].pod != f.pod {
			keys = append(keys, key)
		}
	}
	for key := range before {
		if _, still := now[key]; !still {
			keys = append(keys, key)
		}
	}
	return keys
}

// newest gives the results by the pods' keys: of several sandboxes of a pod, or of
// pods of one name, that which was written last. The caller holds w.mu.
func (w *Watcher) newest() map[string]*result {
	byPod := map[string]*result{}
	for _, r := range w.files {
		if r == nil {
			continue
		}
		if other := byPod[r.key()]; other == nil || r.written.After(other.written) {
			byPod[r.key()] = r
		}
	}
	return byPod
}

// equal tells whether two results say the same about the same pod.
func (r *result) equal(other *result) bool {
	return r.key() == other.key() && r.uid == other.uid && slices.Equal(r.addrs, other.addrs) && slices.Equal(r.links, other.links) && r.written.Equal(other.written)
}
