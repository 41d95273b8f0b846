package proof

import (
	"fmt"
	"net/netip"
	"strings"
)

// chainSet is kube-router's way with policies, as its netpol controller writes
// them for IPv4: a chain for each policy that marks what it admits, a chain for
// each pod that jumps to its policies' chains one after the other, sets of
// addresses on both sides, all in the filter table.
//
// What kube-router has besides is left out, all in its favour: chains for pods
// that no policy selects, the same once more for IPv6, egress, and NFLOG.
type chainSet struct {
	spec    clusterSpec
	servers []netip.Addr
	clients []netip.Addr
	// changed adds one more policy, the one that admits clients to changePort.
	changed bool
	// version is part of all names; kube-router builds everything anew under new
	// names at each change.
	version int
}

// chainPolicy is a policy as rules: from a set of sources to a set of pods.
type chainPolicy struct {
	name    string
	sources []netip.Addr
	ports   []string // the matches for protocol and port
}

func (c chainSet) policies() []chainPolicy {
	from := addrs(firstCaller, callers)
	tcp := fmt.Sprintf("-p tcp -m tcp --dport %d", connectPort)
	var all []chainPolicy
	for i := range c.spec.onPod - 1 {
		all = append(all, chainPolicy{policyName(i), from[i%callers : i%callers+1], []string{tcp}})
	}
	all = append(all, chainPolicy{policyName(c.spec.onPod - 1), c.clients, []string{
		tcp, fmt.Sprintf("-p tcp -m tcp --dport %d", sinkPort), fmt.Sprintf("-p udp -m udp --dport %d", connectPort),
	}})
	if c.changed {
		all = append(all, chainPolicy{"change", c.clients, []string{fmt.Sprintf("-p udp -m udp --dport %d", changePort)}})
	}
	return all
}

// sets gives `ipset restore` its input: every set filled anew and swapped in, as
// kube-router's RestoreSets does.
func (c chainSet) sets() string {
	var b strings.Builder
	b.WriteString("create KR-TMP hash:ip -exist\n")
	fill := func(name string, members []netip.Addr) {
		fmt.Fprintf(&b, "create %s hash:ip -exist\nflush KR-TMP\n", name)
		for _, a := range members {
			fmt.Fprintf(&b, "add KR-TMP %s -exist\n", a)
		}
		fmt.Fprintf(&b, "swap KR-TMP %s\n", name)
	}
	for _, p := range c.policies() {
		fill("KUBE-SRC-"+p.name, p.sources)
		fill("KUBE-DST-"+p.name, c.servers)
	}
	b.WriteString("destroy KR-TMP\n")
	return b.String()
}

// rules gives `iptables-restore` the whole filter table.
func (c chainSet) rules() string {
	var b strings.Builder
	b.WriteString("*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n:KUBE-ROUTER-FORWARD -\n")
	policies := c.policies()
	for _, p := range policies {
		fmt.Fprintf(&b, ":%s -\n", c.chain("NWPLCY", p.name))
	}
	for i := range c.servers {
		fmt.Fprintf(&b, ":%s -\n", c.chain("POD-FW", serverName(i)))
	}
	b.WriteString("-A FORWARD -m comment --comment \"kube-router netpol\" -j KUBE-ROUTER-FORWARD\n")
	for _, p := range policies {
		c.policyRules(&b, p)
	}
	for i, server := range c.servers {
		c.podRules(&b, serverName(i), server, policies)
	}
	b.WriteString("-A KUBE-ROUTER-FORWARD -m mark --mark 0x20000/0x20000 -j ACCEPT\nCOMMIT\n")
	return b.String()
}

func (c chainSet) chain(kind, name string) string {
	return fmt.Sprintf("KUBE-%s-%s-%d", kind, name, c.version)
}

// policyRules mark what the policy admits and return.
func (c chainSet) policyRules(b *strings.Builder, p chainPolicy) {
	for _, port := range p.ports {
		match := fmt.Sprintf("-A %s -m comment --comment \"rule to ACCEPT traffic from source pods to dest pods selected by policy name %s\" "+
			"-m set --match-set KUBE-SRC-%s src -m set --match-set KUBE-DST-%s dst %s", c.chain("NWPLCY", p.name), p.name, p.name, p.name, port)
		fmt.Fprintf(b, "%s -j MARK --set-xmark 0x10000/0x10000\n%s -m mark --mark 0x10000/0x10000 -j RETURN\n", match, match)
	}
}

// podRules send a pod's traffic through its policies and refuse what none marked.
func (c chainSet) podRules(b *strings.Builder, name string, ip netip.Addr, policies []chainPolicy) {
	fw := c.chain("POD-FW", name)
	add := func(format string, args ...any) { fmt.Fprintf(b, "-A "+format+"\n", args...) }
	add("KUBE-ROUTER-FORWARD -d %s/32 -m comment --comment \"rule to jump traffic destined to POD name:%s\" -j %s", ip, name, fw)
	add("%s -m comment --comment \"rule for stateful firewall for pod\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", fw)
	add("%s -d %s/32 -m addrtype --src-type LOCAL -j ACCEPT", fw, ip)
	for _, p := range policies {
		add("%s -m comment --comment \"run through nw policy %s\" -j %s", fw, p.name, c.chain("NWPLCY", p.name))
	}
	add("%s -m comment --comment \"rule to REJECT traffic destined for POD name:%s\" -m mark ! --mark 0x10000/0x10000 -j REJECT", fw, name)
	add("%s -j MARK --set-xmark 0x0/0x10000", fw)
	add("%s -j MARK --set-xmark 0x20000/0x20000", fw)
}
