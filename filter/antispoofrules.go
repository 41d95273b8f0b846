package filter

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// spoofRule is a rule of the anti-spoofing chain. Its name is kept in the kernel as
// the rule's user data, by which it is known again.
type spoofRule struct {
	name  string
	exprs []expr.Any
}

// spoofRules are those of a table, the first that matches ends a packet's way through
// them. Beside a pod's own addresses these are let by:
//   - IPv6 link-local sources (fe80::/10), which no router forwards and which nobody
//     outside the pod knows: neighbour and router discovery and MLD need them;
//   - the unspecified source in ICMPv6, of duplicate address detection (RFC 4862) and
//     of MLD before there is an address (RFC 3810);
//   - ARP probes (RFC 5227), whose sender has no address yet.
//
// What a bridge's port sends that is neither IP nor ARP is dropped: a frame with two
// VLAN tags could hide an address that its receiver would still see.
func spoofRules(fam nftables.TableFamily) []spoofRule {
	const src4, src6, arpSender = 12, 8, 14 // in the network header
	rules := []spoofRule{
		{"not-a-pods", join(linkName(1), lookup(spoofLinks, true), accept)},
		{"own-4", join(protocol(unix.ETH_P_IP), linkName(1), field(2, src4, 4), lookup(spoofPairs4, false), accept)},
		{"own-6", join(protocol(unix.ETH_P_IPV6), linkName(1), field(2, src6, 16), lookup(spoofPairs6, false), accept)},
		{"link-local", join(protocol(unix.ETH_P_IPV6), field(1, src6, 2), masked([]byte{0xff, 0xc0}), equal(0xfe, 0x80), accept)},
		{"unspecified", join(protocol(unix.ETH_P_IPV6), field(1, src6, 16), equal(make([]byte, 16)...),
			expr.Any(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}), equal(unix.IPPROTO_ICMPV6), accept)},
	}
	if fam == nftables.TableFamilyBridge {
		rules = append(rules,
			spoofRule{"own-arp", join(protocol(unix.ETH_P_ARP), linkName(1), field(2, arpSender, 4), lookup(spoofPairs4, false), accept)},
			spoofRule{"arp-probe", join(protocol(unix.ETH_P_ARP), field(1, arpSender, 4), equal(0, 0, 0, 0), accept)})
	}
	return append(rules, spoofRule{"drop", join(&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})})
}

// accept ends the way through this chain, and no other's.
var accept = &expr.Verdict{Kind: expr.VerdictAccept}

// join makes a rule of its expressions, some of which are several.
func join(parts ...any) (all []expr.Any) {
	for _, p := range parts {
		switch p := p.(type) {
		case expr.Any:
			all = append(all, p)
		case []expr.Any:
			all = append(all, p...)
		}
	}
	return all
}

func protocol(etherType uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		equal(binary.BigEndian.AppendUint16(nil, etherType)...),
	}
}

func equal(b ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b} }

func masked(mask []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}
}

// linkName loads the name of the interface that the packet came in by, which fills
// one register of 16 bytes; a pair's address goes to the next.
func linkName(register uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register}
}

func field(register, offset, length uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}
}

func lookup(set string, invert bool) expr.Any {
	return &expr.Lookup{SourceRegister: 1, SetName: set, Invert: invert}
}

// droppedBy gives what a rule's counter counts, if it has one.
func droppedBy(r *nftables.Rule) (n uint64) {
	for _, e := range r.Exprs {
		if c, ok := e.(*expr.Counter); ok {
			n += c.Packets
		}
	}
	return n
}
