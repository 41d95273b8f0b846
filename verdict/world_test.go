package verdict

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
)

// world is a cluster in the engine's own terms, and the slow, obvious judge of
// it: it walks the rules in order, without tables.
type world struct {
	policies    []Policy // all of one subject
	nsBits, pod []Bits
	subject     *Endpoint
	peers       []*Endpoint
	outside     []netip.Addr
}

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// randomWorld makes a subject with up to maxRules rules over a few namespaces,
// label sets, prefixes, ports and names, so that things coincide.
func randomWorld(r *rand.Rand, maxRules, selectors int) *world {
	w := &world{nsBits: randomBits(r, selectors, 12), pod: randomBits(r, selectors, 40)}
	for i := range 60 {
		w.peers = append(w.peers, &Endpoint{
			Namespace: fmt.Sprint("ns", i%12), Name: fmt.Sprint("p", i), Judged: true,
			Addrs:          []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i % 4), byte(i)})},
			NamespaceIndex: uint32(i % 12), LabelsIndex: uint32(r.IntN(40)),
			Ports: randomNames(r), Meaning: uint64(i + 1),
		})
	}
	w.subject = w.peers[0]
	for range 20 {
		w.outside = append(w.outside, netip.AddrFrom4([4]byte{10, byte(r.IntN(2)), byte(r.IntN(4)), byte(r.IntN(256))}), v6(r))
	}
	for rules := r.IntN(maxRules + 1); rules > 0; {
		n := 1 + r.IntN(min(rules, 5))
		p := Policy{Name: fmt.Sprintf("ns0/p%03d-%d", r.IntN(500), len(w.policies))}
		for i := range n {
			p.Rules = append(p.Rules, randomRule(r, i, selectors))
		}
		rules -= n
		w.policies = append(w.policies, p)
	}
	return w
}

func v6(r *rand.Rand) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 15: byte(r.IntN(256)), 14: byte(r.IntN(2))})
}

func randomBits(r *rand.Rand, n, size int) []Bits {
	all := make([]Bits, n)
	for i := range all {
		for j := range size {
			if r.IntN(4) == 0 || i == 0 {
				all[i].Set(uint32(j))
			}
		}
	}
	return all
}

var testProtocols = []Protocol{TCP, UDP, SCTP, ICMP, 47}

func randomNames(r *rand.Rand) (names []NamedPort) {
	for range r.IntN(4) {
		names = append(names, NamedPort{testProtocols[r.IntN(3)], uint16(r.IntN(6)), fmt.Sprint("n", r.IntN(3))})
	}
	return names
}

func randomRule(r *rand.Rand, index, selectors int) Rule {
	rule := Rule{Index: index, AnyPeer: r.IntN(6) == 0, AnyPort: r.IntN(4) == 0}
	for range r.IntN(3) {
		s := PeerSelector{SelectorID(r.IntN(selectors)), SelectorID(r.IntN(selectors))}
		if r.IntN(6) == 0 {
			s.Namespace = SameNamespace
		}
		rule.Selectors = append(rule.Selectors, s)
	}
	for range r.IntN(3) {
		rule.Blocks = append(rule.Blocks, randomBlock(r))
	}
	if rule.AnyPeer {
		rule.Selectors, rule.Blocks = nil, nil
	}
	if rule.AnyPort {
		return rule
	}
	for range r.IntN(4) {
		first := r.IntN(6)
		rule.Ports = append(rule.Ports, PortRange{testProtocols[r.IntN(3)], uint16(first), uint16(first + r.IntN(3))})
	}
	if r.IntN(8) == 0 {
		rule.Ports = append(rule.Ports, PortRange{TCP, uint16(r.IntN(2)), 65535})
	}
	for range r.IntN(2) {
		rule.Names = append(rule.Names, PortName{testProtocols[r.IntN(3)], fmt.Sprint("n", r.IntN(3))})
	}
	return rule
}

func randomBlock(r *rand.Rand) Block {
	a, low := netip.AddrFrom4([4]byte{10, byte(r.IntN(2)), byte(r.IntN(4)), byte(r.IntN(256))}), 6
	if r.IntN(4) == 0 {
		a, low = v6(r), 110
	}
	b := Block{CIDR: netip.PrefixFrom(a, low+r.IntN(a.BitLen()-low)).Masked()}
	for range r.IntN(4) {
		if more := b.CIDR.Bits() + 1 + r.IntN(8); more <= a.BitLen() {
			// Flip bits below the block's own, so that exceptions lie anywhere
			// inside, beside and within each other.
			in := b.CIDR.Addr().As16()
			for bit := 128 - (a.BitLen() - b.CIDR.Bits()); bit < 128; bit++ {
				in[bit/8] |= byte(r.IntN(2)) << (7 - bit%8)
			}
			except := netip.AddrFrom16(in)
			if a.Is4() {
				except = except.Unmap()
			}
			b.Except = append(b.Except, netip.PrefixFrom(except, more).Masked())
		}
	}
	return b
}

// admit is the oracle: the first rule in order that admits the flow.
func (w *world) admit(peer *Endpoint, a netip.Addr, f *Flow, names []NamedPort) (RuleRef, bool) {
	best, found := RuleRef{}, false
	for _, p := range w.policies {
		for _, r := range p.Rules {
			if !w.peerMatches(r, peer, a) || !portMatches(r, f, names) {
				continue
			}
			ref := RuleRef{p.Name, r.Index}
			if !found || ref.Policy < best.Policy || ref.Policy == best.Policy && ref.Rule < best.Rule {
				best, found = ref, true
			}
		}
	}
	return best, found
}

func (w *world) peerMatches(r Rule, peer *Endpoint, a netip.Addr) bool {
	if r.AnyPeer {
		return true
	}
	for _, s := range r.Selectors {
		if peer == nil {
			continue
		}
		in := peer.NamespaceIndex == w.subject.NamespaceIndex
		if s.Namespace != SameNamespace {
			in = w.nsBits[s.Namespace].Has(peer.NamespaceIndex)
		}
		if in && w.pod[s.Pod].Has(peer.LabelsIndex) {
			return true
		}
	}
	for _, b := range r.Blocks {
		in := b.CIDR.Contains(a)
		for _, e := range b.Except {
			in = in && !e.Contains(a)
		}
		if in {
			return true
		}
	}
	return false
}

func portMatches(r Rule, f *Flow, names []NamedPort) bool {
	if r.AnyPort {
		return true
	}
	for _, p := range r.Ports {
		if p.Proto == f.Proto && p.First <= f.DstPort && f.DstPort <= p.Last {
			return true
		}
	}
	for _, want := range r.Names {
		for _, n := range names {
			if n.Name == want.Name && n.Proto == want.Proto && n.Proto == f.Proto && n.Port == f.DstPort {
				return true
			}
		}
	}
	return false
}
