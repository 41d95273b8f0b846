// Package explain answers questions about compiled policy: may this connection
// be made, and why. It looks names up in the cluster's objects, asks the same
// snapshot that the agent enforces, and writes the answer for people or for
// programs. It never touches the kernel.
package explain

import (
	"fmt"
	"net/netip"
	"strings"

	"portcullis/policycache"
	"portcullis/verdict"
)

// Cluster is a cluster's objects together with the policy compiled from them.
// It is read only and may be used by several goroutines.
type Cluster struct {
	objects   *policycache.Objects
	snap      *verdict.Snapshot
	namespace string
	ofNode    bool // that the snapshot judges one node's pods only
}

// OfNode says that the snapshot judges the pods of one node only, so that answers tell
// what isn't known.
func (c *Cluster) OfNode() *Cluster {
	c.ofNode = true
	return c
}

// New gives the cluster of objects o, judged by s. The snapshot must have been
// compiled from o, for no particular node, so that it judges every pod; or see OfNode.
// Namespace is where pods are looked for that are named without one; empty
// means "default".
func New(o *policycache.Objects, s *verdict.Snapshot, namespace string) *Cluster {
	if namespace == "" {
		namespace = "default"
	}
	return &Cluster{objects: o, snap: s, namespace: namespace}
}

// End is one end of a connection: a pod, or an address that is no pod's.
type End struct {
	// Pod is nil for an address that no pod owns.
	Pod *policycache.Pod
	// Addrs are the addresses that the end may use, primary first: those of
	// the pod, or the one by which the end was named.
	Addrs []netip.Addr
}

// String gives the pod's "namespace/name" or else the address.
func (e End) String() string {
	if e.Pod != nil {
		return e.Pod.Key()
	}
	return e.Addrs[0].String()
}

// UnknownPodError says that the cluster has no pod of that name.
type UnknownPodError struct {
	// Key is the pod's "namespace/name".
	Key string
}

// Error is one line.
func (e *UnknownPodError) Error() string { return "there is no pod " + quote(e.Key) }

// End looks up what a user named: an IP, NS/POD, or POD in the cluster's
// namespace. An IP that a pod owns is that pod, reached by that address only.
func (c *Cluster) End(name string) (End, error) {
	if name == "" {
		return End{}, fmt.Errorf("empty name: give NS/POD or an IP")
	}
	if a, err := netip.ParseAddr(name); err == nil {
		return c.endByAddr(a)
	}
	key := name
	switch strings.Count(name, "/") {
	case 0:
		key = c.namespace + "/" + name
	case 1:
	default:
		return End{}, fmt.Errorf("%s is neither NS/POD nor an IP", quote(name))
	}
	p, ok := c.objects.Pods[key]
	if !ok {
		return End{}, &UnknownPodError{Key: key}
	}
	return c.endOfPod(p)
}

func (c *Cluster) endByAddr(a netip.Addr) (End, error) {
	if a.Zone() != "" {
		return End{}, fmt.Errorf("%s: leave out the zone after the %%", quote(a.String()))
	}
	a = a.Unmap()
	e := End{Addrs: []netip.Addr{a}}
	if ep := c.snap.Endpoint(a); ep != nil {
		e.Pod = c.objects.Pods[ep.Key()]
	}
	return e, nil
}

// endOfPod gives a pod's end, or says why nothing can connect to or from it: a
// pod that has finished owns no address, since another pod may be given the
// same one, and of two live pods on one address only one is judged.
func (c *Cluster) endOfPod(p *policycache.Pod) (End, error) {
	if p.Ended() {
		return End{}, fmt.Errorf("pod %s has finished (%s): it owns no address", p.Key(), p.Phase)
	}
	if p.HostNetwork {
		addrs := c.hostAddrs(p)
		if len(addrs) == 0 {
			return End{}, fmt.Errorf("pod %s uses its node's network, and no address of the node is known", p.Key())
		}
		return End{Pod: p, Addrs: addrs}, nil
	}
	if len(p.IPs) == 0 {
		return End{}, fmt.Errorf("pod %s has no address (yet): its status names no podIP", p.Key())
	}
	owned := make([]netip.Addr, 0, 2)
	for _, a := range p.IPs {
		if ep := c.snap.Endpoint(a); ep != nil && ep.Namespace == p.Namespace && ep.Name == p.Name {
			owned = append(owned, a)
		}
	}
	if len(owned) == 0 {
		return End{}, c.notOwner(p)
	}
	return End{Pod: p, Addrs: owned}, nil
}

func (c *Cluster) notOwner(p *policycache.Pod) error {
	a := p.IPs[0]
	if ep := c.snap.Endpoint(a); ep != nil {
		return fmt.Errorf("pod %s doesn't own its address %s: pod %s does", p.Key(), a, ep.Key())
	}
	return fmt.Errorf("pod %s doesn't own its address %s: a pod can't have that one", p.Key(), a)
}

// hostAddrs gives the addresses of a pod in its node's network: its own
// status's, else its node's.
func (c *Cluster) hostAddrs(p *policycache.Pod) []netip.Addr {
	if len(p.IPs) > 0 {
		return p.IPs
	}
	if len(p.HostIPs) > 0 {
		return p.HostIPs
	}
	if n := c.objects.Nodes[p.Node]; n != nil {
		return n.Addrs
	}
	return nil
}

// pair is the two addresses of one connection, of one family.
type pair struct{ src, dst netip.Addr }

// pairs gives a pair of addresses for each family that both ends have, in the
// order of the destination's addresses, whose first is its primary one. The
// first count of found are meant; an error means that there are none.
func pairs(from, to End) (found [2]pair, count int, err error) {
	for _, dst := range to.Addrs {
		if count == len(found) || count > 0 && found[0].dst.Is4() == dst.Is4() {
			continue
		}
		for _, src := range from.Addrs {
			if src.Is4() == dst.Is4() {
				found[count] = pair{src, dst}
				count++
				break
			}
		}
	}
	if count == 0 {
		return found, 0, fmt.Errorf("%s and %s have no IP family in common", from.described(), to.described())
	}
	return found, count, nil
}

func (e End) described() string {
	if e.Pod == nil {
		return e.String()
	}
	all := make([]string, len(e.Addrs))
	for i, a := range e.Addrs {
		all[i] = a.String()
	}
	return e.String() + " (" + strings.Join(all, ", ") + ")"
}

// quote quotes what a user wrote, shortened so that an error stays a line that
// can be read.
func quote(s string) string {
	const most = 120
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
