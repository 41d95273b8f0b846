package policycache

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// claims knows which pods claim which address. HostNetwork pods claim none (they
// have their node's), nor do pods that have ended, whose addresses may belong to
// others by now. A terminating pod keeps its addresses until it is gone.
type claims struct {
	only   map[netip.Addr]*pod   // of addresses with one claim
	rivals map[netip.Addr][]*pod // of those with more
	given  map[netip.Addr]string // see Objects.Given
}

func (c *claims) add(a netip.Addr, p *pod) {
	other, rivals := c.only[a], c.rivals[a]
	switch {
	case len(rivals) > 0:
		if !slices.Contains(rivals, p) {
			c.rivals[a] = append(rivals, p)
		}
	case other == nil:
		c.only[a] = p
	case other != p:
		delete(c.only, a)
		c.rivals[a] = []*pod{other, p}
	}
}

func (c *claims) remove(a netip.Addr, p *pod) {
	if c.only[a] == p {
		delete(c.only, a)
	}
	at := slices.Index(c.rivals[a], p)
	if at < 0 {
		return
	}
	left := slices.Delete(c.rivals[a], at, at+1)
	c.rivals[a] = left
	if len(left) == 1 {
		delete(c.rivals, a)
		c.only[a] = left[0]
	}
}

// owner gives the pod with the best claim, nil if there is none.
func (c *claims) owner(a netip.Addr) *pod {
	if rivals := c.rivals[a]; len(rivals) > 0 {
		if at := slices.IndexFunc(rivals, func(p *pod) bool { return p.Key() == c.given[a] }); at >= 0 {
			return rivals[at]
		}
		return slices.MaxFunc(rivals, func(a, b *pod) int { return claim(a.Pod, b.Pod) })
	}
	return c.only[a]
}

// problems tells of the addresses with more claims than one.
func (c *claims) problems() []Problem {
	var all []Problem
	for a, pods := range c.rivals {
		owner := c.owner(a)
		all = append(all, Problem{
			Object: "pod " + owner.Key(),
			Err:    fmt.Errorf("address %s is also claimed by %s; %s is taken to own it", a, otherKeys(pods, owner), c.word(a, owner)),
		})
	}
	return all
}

// claimed lists the addresses that the pod claims.
func (p *Pod) claimed() []netip.Addr {
	if p == nil || p.HostNetwork || p.Ended() {
		return nil
	}
	return p.IPs
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

func otherKeys(pods []*pod, owner *pod) string {
	var keys []string
	for _, p := range pods {
		if p != owner {
			keys = append(keys, p.Key())
		}
	}
	slices.Sort(keys)
	return fmt.Sprint(slices.Compact(keys))
}

// nodeAddrs counts who says that an address is a node's: nodes themselves, and
// pods by their hostIPs or, with hostNetwork, by their own addresses. A pod that
// has ended says nothing: its node's address may have moved since.
type nodeAddrs map[netip.Addr][]nodeCount

type nodeCount struct {
	node  string
	count int
}

// add counts the addresses of a node n more times, and calls changed with those
// that the node has now and hadn't before, or the other way round.
func (x nodeAddrs) add(node string, addrs []netip.Addr, n int, changed func(netip.Addr)) {
	for _, a := range addrs {
		at, found := slices.BinarySearchFunc(x[a], node, func(c nodeCount, name string) int { return cmp.Compare(c.node, name) })
		if !found {
			x[a] = slices.Insert(x[a], at, nodeCount{node: node})
			changed(a)
		}
		c := &x[a][at]
		if c.count += n; c.count > 0 {
			continue
		}
		x[a] = slices.Delete(x[a], at, at+1)
		if len(x[a]) == 0 {
			delete(x, a)
		}
		changed(a)
	}
}

// names gives the nodes that have the address, sorted, nil for none.
func (x nodeAddrs) names(a netip.Addr) []string {
	var names []string
	for _, c := range x[a] {
		names = append(names, c.node)
	}
	return names
}

// nodeIPs lists the addresses that the pod says its node has.
func (p *Pod) nodeIPs() []netip.Addr {
	if p == nil || p.Node == "" || p.Ended() {
		return nil
	}
	if p.HostNetwork {
		return slices.Concat(p.HostIPs, p.IPs)
	}
	return p.HostIPs
}
