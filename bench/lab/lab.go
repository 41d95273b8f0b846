// Package lab makes a small cluster's network out of network namespaces: one
// node, pods behind it (each routed over its own veth pair, or bridged as the
// bridge CNI does it) and hosts outside, all dual stack. Real packets travel in
// it, judged by whatever rules a program puts into the node's namespace, and
// nothing in it has a route to anywhere else.
//
// The namespaces are named as ip-netns(8) names them, so that people can look
// at them while something runs: `ip netns exec pcl<pid>-<lab>-node ip route`.
// Everybody in a lab goes by a name: "node", "namespace/pod", or a host's name.
//
// It needs root, or CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW.
package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
)

// Node is the name by which the node goes in a lab, and NodeName is the name
// of its Node object in the manifests.
const (
	Node     = "node"
	NodeName = "node-1"
)

// NodeIPs are the addresses that the manifests give the node, and which it uses
// as source towards routed pods and hosts.
var NodeIPs = []netip.Addr{netip.MustParseAddr("192.168.77.10"), netip.MustParseAddr("fd00:77::10")}

// BridgeNets are the address ranges of bridged pods, written with the address
// that the node's bridge, their gateway, has in them.
var BridgeNets = []netip.Prefix{netip.MustParsePrefix("10.22.0.1/16"), netip.MustParsePrefix("fd00:22::1/64")}

// Lab is one node with its pods and the hosts around it. Its methods may be
// called concurrently.
type Lab struct {
	prefix string

	mu         sync.Mutex
	members    map[string]*member
	order      []string
	namespaces map[string]map[string]string
	bridge     netlink.Link
	links      int
	procs      []*Process
	closed     bool
}

// member is the node, a pod or a host.
type member struct {
	*space
	pod     *PodSpec // nil for the node and hosts
	ips     []netip.Addr
	nodeEnd netlink.Link // of its veth pair
	closers []func() error
}

// New makes a lab with a node and nothing else. Labs of one process need
// different names. It first removes the namespaces that labs of dead processes
// left behind.
func New(name string) (*Lab, error) {
	if err := alone(sweep); err != nil {
		return nil, err
	}
	l := &Lab{
		prefix:     fmt.Sprintf("%s%d-%s-", namePrefix, os.Getpid(), name),
		members:    map[string]*member{},
		namespaces: map[string]map[string]string{},
	}
	node, err := l.addMember(Node, NodeIPs, nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make lab %s: %w", name, err), l.Close())
	}
	if err := node.becomeRouter(); err != nil {
		return nil, errors.Join(fmt.Errorf("make lab %s: %w", name, err), l.Close())
	}
	return l, nil
}

// Close ends the lab's processes, servers and namespaces. It may be called more
// than once, and from a signal handler's goroutine while others use the lab,
// whose calls then fail.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	var errs []error
	for _, p := range l.procs {
		errs = append(errs, p.kill())
	}
	l.procs = nil
	for i := len(l.order) - 1; i >= 0; i-- {
		errs = append(errs, l.members[l.order[i]].remove())
	}
	l.members, l.order = map[string]*member{}, nil
	return errors.Join(errs...)
}

// Namespace gives the name of the network namespace of a member, as `ip netns`
// lists it.
func (l *Lab) Namespace(who string) string { return l.prefix + spaceName(who) }

// Names lists the pods and hosts, in the order in which they were added.
func (l *Lab) Names() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.order), func(who string) bool { return who == Node })
}

// IPs gives a member's addresses; nil when there is no such member.
func (l *Lab) IPs(who string) []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	if m := l.members[who]; m != nil {
		return m.ips
	}
	return nil
}

// IP4 gives a member's first IPv4 address, or the zero Addr.
func (l *Lab) IP4(who string) netip.Addr { return first(l.IPs(who), netip.Addr.Is4) }

// IP6 gives a member's first IPv6 address, or the zero Addr.
func (l *Lab) IP6(who string) netip.Addr { return first(l.IPs(who), netip.Addr.Is6) }

func first(ips []netip.Addr, want func(netip.Addr) bool) netip.Addr {
	for _, ip := range ips {
		if want(ip) {
			return ip
		}
	}
	return netip.Addr{}
}

// Do runs fn in a member's network namespace, on an OS thread of its own.
// Sockets that fn makes stay in the namespace for good, processes that it
// starts run in it; goroutines that it starts do not.
func (l *Lab) Do(who string, fn func() error) error {
	m, err := l.member(who)
	if err != nil {
		return err
	}
	return m.do(fn)
}

func (l *Lab) member(who string) (*member, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.New("the lab is closed")
	}
	if m := l.members[who]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("the lab has no %q", who)
}

// addMember makes a namespace and gives it a place in the lab. Half-made
// members are members too, so that Close finds them.
func (l *Lab) addMember(who string, ips []netip.Addr, pod *PodSpec) (*member, error) {
	m := &member{ips: ips, pod: pod}
	return m, l.join(who, m, func() (*space, error) { return newSpace(l.Namespace(who)) })
}

// join gives a member a place in the lab and the space that find makes or finds.
func (l *Lab) join(who string, m *member, find func() (*space, error)) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.New("the lab is closed")
	}
	if l.members[who] != nil {
		return fmt.Errorf("the lab has a %q already", who)
	}
	if m.space, err = find(); err != nil {
		return err
	}
	l.members[who] = m
	l.order = append(l.order, who)
	return nil
}

// dropMember undoes addMember.
func (l *Lab) dropMember(who string) error {
	l.mu.Lock()
	m, node := l.members[who], l.members[Node]
	if m == nil || m == node {
		l.mu.Unlock()
		return fmt.Errorf("the lab has no pod or host %q", who)
	}
	delete(l.members, who)
	l.order = slices.DeleteFunc(l.order, func(name string) bool { return name == who })
	l.mu.Unlock()
	var unlink error
	if m.nodeEnd != nil && node != nil {
		// The kernel takes the pair away some time after the namespace; by hand
		// it is gone, with its routes, before this returns.
		unlink = node.nl.LinkDel(m.nodeEnd)
	}
	return errors.Join(unlink, m.remove())
}

func (m *member) remove() error {
	var errs []error
	for _, c := range m.closers {
		errs = append(errs, c())
	}
	return errors.Join(append(errs, m.space.remove())...)
}

// becomeRouter turns forwarding on and gives the node its own addresses.
func (m *member) becomeRouter() error {
	for _, s := range []struct{ key, value string }{
		{"net/ipv4/ip_forward", "1"},
		{"net/ipv6/conf/all/forwarding", "1"},
		{"net/ipv6/conf/default/forwarding", "1"},
		{"net/ipv4/conf/all/send_redirects", "0"},
		{"net/ipv4/conf/default/send_redirects", "0"},
	} {
		if err := m.Sysctl(s.key, s.value); err != nil {
			return err
		}
	}
	lo, err := m.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	for _, ip := range NodeIPs {
		if err := m.addAddr(lo, netip.PrefixFrom(ip, ip.BitLen())); err != nil {
			return err
		}
	}
	return nil
}
