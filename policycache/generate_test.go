package policycache_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/policycache"
	"portcullis/verdict"
)

// The generator draws clusters and flows from small pools, so that labels,
// addresses and ports collide all the time: what never meets can't disagree.

// dice is a source of choices: pseudo-random numbers, or a fuzzer's bytes and
// after them pseudo-random numbers.
type dice struct {
	bytes []byte
	rest  *rand.Rand
	modes bool // namespaces and nodes have modes
}

func newDice(seed uint64) *dice { return &dice{rest: rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))} }

// n gives a number in [0, k).
func (d *dice) n(k int) int {
	if len(d.bytes) > 0 {
		b := d.bytes[0]
		d.bytes = d.bytes[1:]
		return int(b) % k
	}
	return d.rest.IntN(k)
}

// pct is true p times in a hundred.
func (d *dice) pct(p int) bool { return d.n(100) < p }

func pick[T any](d *dice, pool ...T) T { return pool[d.n(len(pool))] }

// rarely is how often, in per cent, each thing that can be wrong is wrong.
const rarely = 3

var (
	genNamespaces = []string{"a", "a", "a-b", "default"}
	genNodes      = []string{"n1", "n2", "n3"}
	genKeys       = []string{"app", "example.com/tier"}
	genValues     = []string{"x", "x", "y", ""}
	genPortNames  = []string{"http", "dns"}
	genPorts      = []int{1, 53, 80, 81, 8080, 65535}
	genProtos     = []verdict.Protocol{verdict.TCP, verdict.UDP, verdict.SCTP}
	genAddrs4     = genAddrs("10.0.0.", 14)
	genAddrs6     = genAddrs("fd00::", 14)
	genOutside    = append(genAddrs("172.17.0.", 3), genAddrs("2001:db8::", 3)...)
	genHosts      = append(genAddrs("192.168.0.", 3), genAddrs("fd01::", 3)...)
	genEpoch      = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
)

func genAddrs(prefix string, count int) []netip.Addr {
	var all []netip.Addr
	for i := range count {
		all = append(all, netip.MustParseAddr(fmt.Sprintf("%s%d", prefix, i+1)))
	}
	return all
}

// anyAddr gives an address that may be a pod's, a node's or nobody's.
func (d *dice) anyAddr() netip.Addr {
	return pick(d, pick(d, genAddrs4...), pick(d, genAddrs6...), pick(d, genHosts...), pick(d, genOutside...))
}

// cluster draws a whole state.
func (d *dice) cluster() *policycache.Objects {
	o := policycache.NewObjects()
	for _, name := range genNamespaces {
		if d.pct(85) {
			o.Namespaces[name] = d.namespace(name)
		}
	}
	for i, name := range genNodes {
		if d.pct(80) {
			o.Nodes[name] = d.node(name, i)
		}
	}
	for i := range 3 + d.n(7) {
		p := d.pod(pick(d, genNamespaces...), fmt.Sprintf("pod%d", i))
		o.Pods[p.Key()] = p
	}
	for i := range 1 + d.n(6) {
		p := d.policy(pick(d, genNamespaces...), fmt.Sprintf("pol%d", i*5))
		o.Policies[p.Namespace+"/"+p.Name] = p
	}
	return o
}

func (d *dice) namespace(name string) *policycache.Namespace {
	ns := &policycache.Namespace{Name: name, Labels: d.labels()}
	if d.pct(20) {
		ns.Labels[corev1.LabelMetadataName] = pick(d, genNamespaces...)
	}
	ns.Mode = d.mode()
	return ns
}

func (d *dice) node(name string, i int) *policycache.Node {
	n := &policycache.Node{Name: name}
	if d.pct(90) {
		n.Addrs = append(n.Addrs, genHosts[i], genHosts[i+3])
	}
	if d.pct(15) {
		n.Addrs = append(n.Addrs, d.anyAddr())
	}
	n.Mode = d.mode()
	return n
}

func (d *dice) mode() string {
	if !d.modes {
		return ""
	}
	return pick(d, "", "", "audit-only", "enforce")
}

func (d *dice) labels() map[string]string {
	all := map[string]string{}
	for _, k := range genKeys {
		if d.pct(60) {
			all[k] = pick(d, genValues...)
		}
	}
	return all
}

func (d *dice) pod(ns, name string) *policycache.Pod {
	p := &policycache.Pod{
		Namespace: ns, Name: name, UID: fmt.Sprint(d.n(1 << 16)),
		Labels:  d.labels(),
		Node:    pick(d, "n1", "n1", "n2", "n2", "n3", ""),
		Phase:   pick(d, "Running", "Running", "Running", "Running", "Running", "Running", "Running", "Pending", "Unknown", "", "Succeeded", "Failed"),
		Created: genEpoch.Add(time.Duration(d.n(3)) * time.Minute),
	}
	if d.pct(90) {
		p.IPs = append(p.IPs, pick(d, genAddrs4...))
	}
	if d.pct(60) {
		p.IPs = append(p.IPs, pick(d, genAddrs6...))
	}
	if d.pct(10) {
		p.IPs = append(p.IPs, pick(d, genAddrs6[1], genAddrs6[2], genHosts[0], genOutside[0]))
	}
	p.IPs = distinct(p.IPs)
	if d.pct(50) {
		p.HostIPs = append(p.HostIPs, pick(d, genHosts...))
	}
	if d.pct(12) {
		p.HostNetwork, p.IPs = true, []netip.Addr{pick(d, genHosts...)}
		if d.pct(30) {
			p.IPs = append(p.IPs, pick(d, genAddrs4...))
		}
	}
	for range d.n(4) {
		p.Ports = append(p.Ports, verdict.NamedPort{Proto: pick(d, genProtos...), Port: uint16(pick(d, genPorts...)), Name: pick(d, genPortNames...)})
	}
	return p
}

func distinct(in []netip.Addr) []netip.Addr {
	seen, out := map[netip.Addr]bool{}, []netip.Addr(nil)
	for _, a := range in {
		if !seen[a] {
			seen[a], out = true, append(out, a)
		}
	}
	return out
}

func (d *dice) policy(ns, name string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
	if d.pct(40) {
		p.Spec.PodSelector = *d.selector()
	}
	p.Spec.PolicyTypes = pick(d, nil, nil, []networkingv1.PolicyType{}, []networkingv1.PolicyType{ingress},
		[]networkingv1.PolicyType{egress}, []networkingv1.PolicyType{ingress, egress},
		[]networkingv1.PolicyType{egress, ingress})
	if d.pct(rarely) {
		p.Spec.PolicyTypes = append(p.Spec.PolicyTypes[:len(p.Spec.PolicyTypes):len(p.Spec.PolicyTypes)], pick[networkingv1.PolicyType](d, "", "ingress", "Both"))
	}
	if d.pct(15) {
		p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{}
	}
	for range pick(d, 0, 1, 1, 2, 3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: d.ports(), From: d.peers()})
	}
	for range pick(d, 0, 1, 1, 2, 3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{Ports: d.ports(), To: d.peers()})
	}
	return p
}

func (d *dice) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	for range pick(d, 0, 0, 1, 1, 1, 2) {
		key, value := pick(d, genKeys...), pick(d, genValues...)
		if d.pct(rarely) {
			key = pick(d, "", "a b", "x/y/z", "-")
		}
		if d.pct(rarely) {
			value = pick(d, "-x", "a b")
		}
		if s.MatchLabels == nil {
			s.MatchLabels = map[string]string{}
		}
		s.MatchLabels[key] = value
	}
	for range pick(d, 0, 0, 0, 1, 1, 2) {
		s.MatchExpressions = append(s.MatchExpressions, d.requirement())
	}
	return s
}

func (d *dice) requirement() metav1.LabelSelectorRequirement {
	r := metav1.LabelSelectorRequirement{Key: pick(d, genKeys...)}
	if d.pct(10) {
		r.Key = corev1.LabelMetadataName
	}
	switch d.n(4) {
	case 0:
		r.Operator, r.Values = metav1.LabelSelectorOpIn, d.values(r.Key)
	case 1:
		r.Operator, r.Values = metav1.LabelSelectorOpNotIn, d.values(r.Key)
	case 2:
		r.Operator = metav1.LabelSelectorOpExists
	case 3:
		r.Operator = metav1.LabelSelectorOpDoesNotExist
	}
	if d.pct(rarely) {
		r.Operator = pick[metav1.LabelSelectorOperator](d, "", "in", "Gt", metav1.LabelSelectorOpExists, metav1.LabelSelectorOpIn)
	}
	return r
}

func (d *dice) values(key string) []string {
	pool := genValues
	if key == corev1.LabelMetadataName {
		pool = genNamespaces
	}
	var all []string
	for range 1 + d.n(3) {
		all = append(all, pick(d, pool...))
	}
	if d.pct(rarely) {
		all = append(all, pick(d, "-x", "a b"))
	}
	return all
}

func (d *dice) ports() []networkingv1.NetworkPolicyPort {
	if d.pct(5) {
		return []networkingv1.NetworkPolicyPort{}
	}
	var all []networkingv1.NetworkPolicyPort
	for range pick(d, 0, 0, 0, 1, 1, 2, 3) {
		all = append(all, d.port())
	}
	return all
}

func (d *dice) port() networkingv1.NetworkPolicyPort {
	var p networkingv1.NetworkPolicyPort
	if d.pct(70) {
		proto := pick(d, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
		if d.pct(rarely) {
			proto = pick[corev1.Protocol](d, "", "tcp", "ICMP", "ANY")
		}
		p.Protocol = &proto
	}
	switch d.n(4) {
	case 0:
		name := intstr.FromString(pick(d, genPortNames...))
		p.Port = &name
	case 1, 2:
		number := intstr.FromInt32(int32(pick(d, genPorts...)))
		p.Port = &number
		if d.pct(40) {
			end := min(65535, number.IntVal+int32(pick(d, 0, 1, 27, 1000, 65535)))
			p.EndPort = &end
		}
	}
	if d.pct(rarely) {
		d.spoilPort(&p)
	}
	return p
}

// spoilPort makes a port one that the API server would refuse.
func (d *dice) spoilPort(p *networkingv1.NetworkPolicyPort) {
	port := pick(d, intstr.FromInt32(0), intstr.FromInt32(65536), intstr.FromInt32(-1), intstr.FromString(""), intstr.FromString("80"), intstr.FromString("no_such"))
	end := pick[int32](d, 0, -1, 65536, 52)
	switch d.n(4) {
	case 0:
		p.Port = &port
	case 1:
		p.EndPort = &end
	case 2:
		p.EndPort, p.Port = &end, nil
	case 3:
		name := intstr.FromString("http")
		p.EndPort, p.Port = &end, &name
	}
}

func (d *dice) peers() []networkingv1.NetworkPolicyPeer {
	if d.pct(5) {
		return []networkingv1.NetworkPolicyPeer{}
	}
	var all []networkingv1.NetworkPolicyPeer
	for range pick(d, 0, 1, 1, 1, 1, 1, 2, 3) {
		all = append(all, d.peer())
	}
	return all
}

func (d *dice) peer() networkingv1.NetworkPolicyPeer {
	var p networkingv1.NetworkPolicyPeer
	switch d.n(6) {
	case 0, 1:
		p.PodSelector = d.selector()
	case 2:
		p.NamespaceSelector = d.selector()
	case 3:
		p.PodSelector, p.NamespaceSelector = d.selector(), d.selector()
	default:
		p.IPBlock = d.block()
	}
	if d.pct(rarely) {
		p = pick(d, networkingv1.NetworkPolicyPeer{}, networkingv1.NetworkPolicyPeer{IPBlock: d.block(), PodSelector: d.selector()},
			networkingv1.NetworkPolicyPeer{IPBlock: d.block(), NamespaceSelector: d.selector()})
	}
	return p
}

// block draws an ipBlock around one of the pools' addresses, now and then with
// host bits, as 4-in-6, or wrong.
func (d *dice) block() *networkingv1.IPBlock {
	a := d.anyAddr()
	shorter := pick(d, 0, 1, 2, 3, 4, 8, 16, a.BitLen())
	cidr := netip.PrefixFrom(a, a.BitLen()-shorter)
	b := &networkingv1.IPBlock{CIDR: d.cidr(cidr)}
	for range pick(d, 0, 0, 1, 1, 2, 3) {
		if cidr.IsSingleIP() {
			break
		}
		inside := d.inside(cidr)
		b.Except = append(b.Except, d.cidr(netip.PrefixFrom(inside, cidr.Bits()+1+d.n(a.BitLen()-cidr.Bits()))))
	}
	if d.pct(rarely) {
		b.CIDR = pick(d, "", "10.0.0.1", "10.0.0.0/33", "fd00::/129", "10.0.0.0/", "pods", "fe80::%eth0/64", "10.0.0.0/-1")
	}
	if d.pct(rarely) {
		b.Except = append(b.Except, pick(d, "", "10.0.0.1", "0.0.0.0/0", "::/0", "203.0.113.0/24", cidr.Masked().String()))
	}
	return b
}

// inside gives an address of the pools that lies in a prefix, if it finds one.
func (d *dice) inside(p netip.Prefix) netip.Addr {
	for range 8 {
		if a := d.anyAddr(); p.Contains(a) {
			return a
		}
	}
	return p.Addr()
}

func (d *dice) cidr(p netip.Prefix) string {
	if d.pct(80) {
		p = p.Masked()
	}
	if p.Addr().Is4() && d.pct(10) {
		return fmt.Sprintf("::ffff:%s/%d", p.Addr(), p.Bits()+96)
	}
	return p.String()
}

// flows draws flows, of which some differ from an earlier one in a single
// field: those would be mistaken for each other by a cache.
func (d *dice) flows(o *policycache.Objects, count int) []verdict.Flow {
	var all []verdict.Flow
	for range count {
		if len(all) > 0 && d.pct(40) {
			all = append(all, d.twist(o, pick(d, all...)))
		} else {
			all = append(all, d.flow(o))
		}
	}
	return all
}

func (d *dice) twist(o *policycache.Objects, f verdict.Flow) verdict.Flow {
	fresh := d.flow(o)
	switch d.n(6) {
	case 0:
		f.Src, f.Dst = f.Dst, f.Src
	case 1:
		f.DstPort = fresh.DstPort
	case 2:
		f.Proto = fresh.Proto
	case 3:
		f.ICMPType = d.icmpType(f.Proto)
	case 4:
		f.Defect = fresh.Defect
	case 5:
		if f.Src.Is4() == fresh.Src.Is4() && f.Src.Is6() == fresh.Src.Is6() {
			f.Src = fresh.Src
		}
	}
	if !f.Src.IsValid() && f.Defect == verdict.ReasonNone {
		return fresh
	}
	return f
}

// flow draws a flow between addresses of one family, most often between
// addresses that some pod has.
func (d *dice) flow(o *policycache.Objects) verdict.Flow {
	if d.pct(1) {
		return verdict.Flow{Defect: pick(d, verdict.ReasonTruncated, verdict.ReasonMalformed)}
	}
	f := verdict.Flow{Src: d.end(o), Dst: d.end(o), Proto: pick(d, genProtos...), SrcPort: uint16(d.n(65536))}
	for range 50 {
		if f.Src.Is4() == f.Dst.Is4() && (f.Src != f.Dst || d.pct(2)) {
			break
		}
		f.Dst = d.end(o)
	}
	if f.Src.Is4() != f.Dst.Is4() {
		f.Dst = f.Src
	}
	f.DstPort = uint16(pick(d, genPorts...) + pick(d, 0, 0, 0, 0, -1, 1))
	if dst := oracleOwner(o, f.Dst); dst != nil && len(dst.Ports) > 0 && d.pct(30) {
		f.DstPort = pick(d, dst.Ports...).Port
	}
	if d.pct(15) {
		f.Proto, f.SrcPort, f.DstPort = pick[verdict.Protocol](d, verdict.ICMP, verdict.ICMPv6, 47, 0), 0, 0
	}
	f.ICMPType = d.icmpType(f.Proto)
	if d.pct(4) {
		f.Defect = pick(d, verdict.ReasonTruncated, verdict.ReasonFragment, verdict.ReasonMalformed)
	}
	return f
}

func (d *dice) icmpType(p verdict.Protocol) uint8 {
	if p != verdict.ICMP && p != verdict.ICMPv6 {
		return 0
	}
	return pick[uint8](d, 0, 8, 128, 132, 133, 135, 136, 137, 138)
}

// end gives an address of some pod, or any.
func (d *dice) end(o *policycache.Objects) netip.Addr {
	if d.pct(25) || len(o.Pods) == 0 {
		return d.anyAddr()
	}
	if p := o.Pods[keyOf(d, o.Pods)]; len(p.IPs) > 0 {
		return pick(d, p.IPs...)
	}
	return d.anyAddr()
}

// mutate gives a changed copy: what changes is replaced, never written to, and
// what doesn't change is now the same object and now an equal one.
func (d *dice) mutate(o *policycache.Objects) *policycache.Objects {
	next := clone(o, d.pct(30))
	for range 1 + d.n(3) {
		d.mutateOnce(next)
	}
	return next
}

func (d *dice) mutateOnce(o *policycache.Objects) {
	ns := pick(d, genNamespaces...)
	switch d.n(10) {
	case 0:
		o.Namespaces[ns] = d.namespace(ns)
	case 1:
		delete(o.Namespaces, ns)
	case 2:
		i := d.n(len(genNodes))
		o.Nodes[genNodes[i]] = d.node(genNodes[i], i)
	case 3:
		delete(o.Pods, keyOf(d, o.Pods))
	case 4:
		name := fmt.Sprintf("pod%d", d.n(10))
		o.Pods[ns+"/"+name] = d.pod(ns, name)
	case 5, 6, 7:
		if key := keyOf(d, o.Pods); key != "" {
			o.Pods[key] = d.touch(o.Pods[key])
		}
	case 8:
		delete(o.Policies, keyOf(d, o.Policies))
	case 9:
		name := fmt.Sprintf("pol%d", d.n(6)*5)
		o.Policies[ns+"/"+name] = d.policy(ns, name)
	}
}

// keyOf picks a key of a map, the same one for the same throws; of an empty map
// it is empty.
func keyOf[V any](d *dice, m map[string]V) string {
	keys := slices.Sorted(maps.Keys(m))
	if len(keys) == 0 {
		return ""
	}
	return pick(d, keys...)
}

// touch changes one thing about a pod that stays otherwise what it was.
func (d *dice) touch(p *policycache.Pod) *policycache.Pod {
	q, fresh := *p, d.pod(p.Namespace, p.Name)
	switch d.n(6) {
	case 0:
		q.Labels = fresh.Labels
	case 1:
		q.Phase = fresh.Phase
	case 2:
		q.Node = fresh.Node
	case 3:
		q.Ports = fresh.Ports
	case 4:
		q.IPs = fresh.IPs
	case 5:
		q.HostIPs = fresh.HostIPs
	}
	return &q
}

// clone copies the maps, and with deep everything that they point to.
func clone(o *policycache.Objects, deep bool) *policycache.Objects {
	c := policycache.NewObjects()
	for k, v := range o.Namespaces {
		c.Namespaces[k] = v
		if deep {
			c.Namespaces[k] = &policycache.Namespace{Name: v.Name, Labels: v.Labels, Mode: v.Mode}
		}
	}
	for k, v := range o.Nodes {
		c.Nodes[k] = v
		if deep {
			c.Nodes[k] = &policycache.Node{Name: v.Name, Addrs: v.Addrs, Mode: v.Mode}
		}
	}
	for k, v := range o.Pods {
		c.Pods[k] = v
		if deep {
			q := *v
			c.Pods[k] = &q
		}
	}
	for k, v := range o.Policies {
		c.Policies[k] = v
		if deep {
			c.Policies[k] = v.DeepCopy()
		}
	}
	return c
}
