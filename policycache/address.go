package policycache

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// ownAddresses gives each pod address its pod. HostNetwork pods own none (they
// have their node's), nor do pods that have ended, whose addresses may belong
// to others by now. A terminating pod keeps its addresses until it is gone.
func (w *compilation) ownAddresses() map[netip.Addr]*Pod {
	owners := make(map[netip.Addr]*Pod, len(w.objects.Pods))
	rivals := map[netip.Addr][]*Pod{}
	for _, pod := range w.objects.Pods {
		if pod.HostNetwork || pod.Ended() {
			continue
		}
		for _, a := range pod.IPs {
			other := owners[a]
			if other == pod {
				continue
			}
			if other == nil {
				owners[a] = pod
				continue
			}
			if len(rivals[a]) == 0 {
				rivals[a] = append(rivals[a], other)
			}
			rivals[a] = append(rivals[a], pod)
		}
	}
	for a, pods := range rivals {
		owners[a] = slices.MaxFunc(pods, claim)
		w.problems = append(w.problems, Problem{
			Object: "pod " + owners[a].Key(),
			Err:    fmt.Errorf("address %s is also claimed by %s; the newest running pod is taken to own it", a, otherKeys(pods, owners[a])),
		})
	}
	return owners
}

// Ended tells whether all containers of the pod have stopped for good.
func (p *Pod) Ended() bool { return p.Phase == "Succeeded" || p.Phase == "Failed" }

// claim compares two live pods' claims to an address: a running pod's is the
// better one, then the newer one's, and the names decide between equals so
// that every node decides alike.
func claim(a, b *Pod) int {
	running := func(p *Pod) int {
		if p.Phase == "Running" {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(running(a), running(b)), a.Created.Compare(b.Created), cmp.Compare(a.Key(), b.Key()))
}

func otherKeys(pods []*Pod, owner *Pod) string {
	var keys []string
	for _, p := range pods {
		if p != owner {
			keys = append(keys, p.Key())
		}
	}
	slices.Sort(keys)
	return fmt.Sprint(slices.Compact(keys))
}

// nodeAddresses gives the nodes' addresses: those that nodes name themselves,
// and those that pods say their node has (hostIPs, and the addresses of
// hostNetwork pods). A pod that has ended says nothing: its node's address may
// have moved since.
func (w *compilation) nodeAddresses() map[netip.Addr][]string {
	nodes := map[netip.Addr][]string{}
	add := func(node string, addrs []netip.Addr) {
		for _, a := range addrs {
			if at, found := slices.BinarySearch(nodes[a], node); !found {
				nodes[a] = slices.Insert(nodes[a], at, node)
			}
		}
	}
	for _, node := range w.objects.Nodes {
		add(node.Name, node.Addrs)
	}
	for _, pod := range w.objects.Pods {
		if pod.Node == "" || pod.Ended() {
			continue
		}
		add(pod.Node, pod.HostIPs)
		if pod.HostNetwork {
			add(pod.Node, pod.IPs)
		}
	}
	return nodes
}
