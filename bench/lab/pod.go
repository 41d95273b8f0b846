package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Mode is how a pod hangs on the node.
type Mode int

const (
	// Routed pods have a veth pair each and /32 and /128 routes, as the ptp
	// CNI and Calico make them.
	Routed Mode = iota
	// Bridged pods are ports of the node's bridge cni0, as the bridge CNI
	// makes them. Their addresses lie in BridgeNets.
	Bridged
)

// String gives "routed" or "bridged".
func (m Mode) String() string {
	if m == Bridged {
		return "bridged"
	}
	return "routed"
}

// Proto is a protocol as the API and the probes name it.
type Proto string

// The protocols that probes speak. ICMP is ICMPv6 towards IPv6 addresses.
const (
	TCP  Proto = "TCP"
	UDP  Proto = "UDP"
	SCTP Proto = "SCTP"
	ICMP Proto = "ICMP"
)

// Port is a port that a pod serves. One with a name is a container port in the
// manifests too.
type Port struct {
	Proto Proto
	Port  uint16
	Name  string
}

// PodSpec is a pod to be: where it is, what selectors see of it and what it
// serves from the start.
type PodSpec struct {
	Namespace, Name string
	Labels          map[string]string
	IPs             []netip.Addr
	Mode            Mode
	Ports           []Port
}

// Key gives "namespace/name", the name by which the pod goes in the lab.
func (p PodSpec) Key() string { return p.Namespace + "/" + p.Name }

var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// AddNamespace gives a namespace labels. Namespaces of pods exist without it,
// with no labels.
func (l *Lab) AddNamespace(name string, labels map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.namespaces[name] = labels
}

// AddPod makes a pod of the node and starts servers for its ports.
func (l *Lab) AddPod(p PodSpec) error {
	if p.Namespace == "" || p.Name == "" || len(p.IPs) == 0 {
		return fmt.Errorf("pod %s: a pod needs a namespace, a name and an address", p.Key())
	}
	m, err := l.addMember(p.Key(), p.IPs, &p)
	if err != nil {
		return err
	}
	wire := l.wireRouted
	if p.Mode == Bridged {
		wire = l.wireBridged
	}
	if err := wire(m); err != nil {
		return errors.Join(fmt.Errorf("pod %s: %w", p.Key(), err), l.dropMember(p.Key()))
	}
	return l.Serve(p.Key(), p.Ports...)
}

// AddHost makes a machine outside the cluster, whose one neighbour is the node.
func (l *Lab) AddHost(name string, ips ...netip.Addr) error {
	m, err := l.addMember(name, ips, nil)
	if err != nil {
		return err
	}
	if err := l.wireRouted(m); err != nil {
		return errors.Join(fmt.Errorf("host %s: %w", name, err), l.dropMember(name))
	}
	return nil
}

// Remove takes a pod or host away, with its servers, links and routes.
func (l *Lab) Remove(who string) error { return l.dropMember(who) }

// link makes a veth pair between the node and a member, whose end is eth0, and
// gives the node's end back, up and known by its index.
func (l *Lab) link(m *member) (node *member, nodeEnd, podEnd netlink.Link, err error) {
	node, err = l.member(Node)
	if err != nil {
		return nil, nil, nil, err
	}
	l.mu.Lock()
	l.links++
	name := fmt.Sprintf("v%d", l.links)
	l.mu.Unlock()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(m.ns))}
	if err := node.nl.LinkAdd(veth); err != nil {
		return nil, nil, nil, fmt.Errorf("make veth pair %s: %w", name, err)
	}
	if nodeEnd, err = node.nl.LinkByName(name); err != nil {
		return nil, nil, nil, fmt.Errorf("find %s: %w", name, err)
	}
	m.nodeEnd = nodeEnd
	if podEnd, err = m.nl.LinkByName("eth0"); err != nil {
		return nil, nil, nil, fmt.Errorf("find eth0: %w", err)
	}
	return node, nodeEnd, podEnd, nil
}

// wireRouted gives the node's end of the pair the gateways' link-local
// addresses and one route for each of the member's addresses.
func (l *Lab) wireRouted(m *member) error {
	node, nodeEnd, podEnd, err := l.link(m)
	if err != nil {
		return err
	}
	if err := up(node, nodeEnd, netip.PrefixFrom(gateway4, 32), netip.PrefixFrom(gateway6, 64)); err != nil {
		return err
	}
	var own []netip.Prefix
	for _, ip := range m.ips {
		own = append(own, netip.PrefixFrom(ip, ip.BitLen()))
	}
	if err := up(m, podEnd, own...); err != nil {
		return err
	}
	for _, ip := range m.ips {
		src := first(NodeIPs, func(a netip.Addr) bool { return a.Is4() == ip.Is4() })
		r := &netlink.Route{LinkIndex: nodeEnd.Attrs().Index, Dst: hostNet(ip), Src: src.AsSlice()}
		if ip.Is4() {
			r.Scope = netlink.SCOPE_LINK
		}
		if err := node.addRoute(r); err != nil {
			return err
		}
	}
	return defaultRoutes(m, podEnd, gateway4, gateway6)
}

// wireBridged makes the member a port of cni0, hairpin on as kubelet's bridge
// has it, so that a pod may reach itself through a Service.
func (l *Lab) wireBridged(m *member) error {
	bridge, err := l.ensureBridge()
	if err != nil {
		return err
	}
	node, nodeEnd, podEnd, err := l.link(m)
	if err != nil {
		return err
	}
	if err := node.nl.LinkSetMaster(nodeEnd, bridge); err != nil {
		return fmt.Errorf("make %s a port of cni0: %w", nodeEnd.Attrs().Name, err)
	}
	if err := node.nl.LinkSetHairpin(nodeEnd, true); err != nil {
		return fmt.Errorf("set hairpin on %s: %w", nodeEnd.Attrs().Name, err)
	}
	if err := up(node, nodeEnd); err != nil {
		return err
	}
	var own []netip.Prefix
	for _, ip := range m.ips {
		net, err := bridgeNet(ip)
		if err != nil {
			return err
		}
		own = append(own, netip.PrefixFrom(ip, net.Bits()))
	}
	if err := up(m, podEnd, own...); err != nil {
		return err
	}
	return defaultRoutes(m, podEnd, BridgeNets[0].Addr(), BridgeNets[1].Addr())
}

func bridgeNet(ip netip.Addr) (netip.Prefix, error) {
	for _, n := range BridgeNets {
		if n.Contains(ip) {
			return n, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("%s is in none of the bridge's networks %v", ip, BridgeNets)
}

func (l *Lab) ensureBridge() (netlink.Link, error) {
	node, err := l.member(Node)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bridge != nil {
		return l.bridge, nil
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "cni0"
	// A bridge without an address of its own takes its ports' lowest, which
	// changes as pods come and go and leaves wrong neighbour entries behind.
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0x22, 0, 0, 0, 1}
	if err := node.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("make bridge cni0: %w", err)
	}
	bridge, err := node.nl.LinkByName("cni0")
	if err != nil {
		return nil, fmt.Errorf("find cni0: %w", err)
	}
	if err := up(node, bridge, BridgeNets...); err != nil {
		return nil, err
	}
	l.bridge = bridge
	return bridge, nil
}

// up sets a link up and then adds addresses (IPv6 routes need the link up).
func up(m *member, link netlink.Link, addrs ...netip.Prefix) error {
	if err := m.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", link.Attrs().Name, err)
	}
	for _, p := range addrs {
		if err := m.addAddr(link, p); err != nil {
			return err
		}
	}
	return nil
}

// defaultRoutes sends all of a member's traffic to the node, in the families
// of which it has an address.
func defaultRoutes(m *member, link netlink.Link, gw4, gw6 netip.Addr) error {
	var gws []netip.Addr
	if first(m.ips, netip.Addr.Is4).IsValid() {
		gws = append(gws, gw4)
	}
	if first(m.ips, netip.Addr.Is6).IsValid() {
		gws = append(gws, gw6)
	}
	for _, gw := range gws {
		everywhere := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if gw.Is4() {
			everywhere = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		r := &netlink.Route{
			LinkIndex: link.Attrs().Index, Dst: ipNet(everywhere), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
		}
		if err := m.addRoute(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return nil
}

// Label gives a pod other labels, which the next Manifests tells.
func (l *Lab) Label(who string, labels map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.members[who]
	if m == nil || m.pod == nil {
		return fmt.Errorf("the lab has no pod %q", who)
	}
	p := *m.pod
	p.Labels = labels
	m.pod = &p
	return nil
}
