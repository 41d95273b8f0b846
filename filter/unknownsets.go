package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/mdlayher/netlink"
	vish "github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// unknownSetType is the type of the sets of unknown pods' addresses: the node's pod
// ranges, and as exceptions from them ("nomatch") the addresses that somebody has.
// The longest prefix that holds an address decides, so that one set, and one rule for
// each end of a packet, tells who is a pod and isn't known.
const (
	unknownSetType     = "hash:net"
	unknownSetRevision = 2 // the first with exceptions
)

// unknown is the set of the family's unknown pods.
func (f family) unknown() memberSet {
	return memberSet{f, "portcullis-unknown-" + strconv.Itoa(int(f))}
}

// unknownPods is what the sets of unknown pods are to hold. Where it is off there are
// no such sets.
type unknownPods struct {
	on     bool
	ranges []netip.Prefix
	known  []netip.Addr
	local  []netip.Addr // the node's own, see ownAddrs
	// next is what the next SetIsolated puts in the place of ranges and known.
	next struct {
		ranges []netip.Prefix
		known  []netip.Addr
	}
	// stale says that the sets have to be looked at: what they are to hold has
	// changed, or it is time to see whether others have changed them.
	stale bool
}

// WatchUnknown says which packets are queued because nobody knows whose they are:
// those from and to addresses of the ranges that aren't known. It takes effect with
// the next SetIsolated and not before, not even by a Repair: an isolated pod that is
// known by now mustn't be taken from the ones before it is among the others.
func (k *Kernel) WatchUnknown(ranges []netip.Prefix, known []netip.Addr) {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	k.unknown.next.ranges, k.unknown.next.known = ranges, known
}

// takeUnknown lets the last WatchUnknown take effect. The caller holds setLock.
func (k *Kernel) takeUnknown() {
	u := &k.unknown
	if !u.on || slices.Equal(u.ranges, u.next.ranges) && slices.Equal(u.known, u.next.known) {
		return
	}
	if !slices.Equal(u.ranges, u.next.ranges) {
		u.local = ownAddrs(k.log.Debug)
	}
	u.ranges, u.known, u.stale = u.next.ranges, u.next.known, true
}

// lookAround looks again which addresses are the node's own, and takes in what has
// changed: a bridge may have come, and nothing needed repair for that. The caller
// holds setLock.
func (k *Kernel) lookAround() {
	k.unknown.stale = true
	if !k.unknown.on || len(k.unknown.ranges) == 0 {
		return
	}
	if now := ownAddrs(k.log.Debug); !slices.Equal(now, k.unknown.local) {
		k.unknown.local = now
		k.fillSets() // which is done again, and then tells what is wrong
		k.unknown.stale = true
	}
}

// ownAddrs lists the addresses of this network namespace and the broadcast
// addresses of their networks: within a pod range the bridge's, as a rule. They are
// nobody's but the node's, and their packets don't pass a forwarding node but by
// broadcast, or forged, which other rules look after.
func ownAddrs(complain func(string, ...any)) (local []netip.Addr) {
	addrs, err := whole(func() ([]vish.Addr, error) { return vish.AddrList(nil, vish.FAMILY_ALL) })
	if err != nil {
		complain("the node's own addresses can't be listed", "err", err)
	}
	for _, a := range addrs {
		for _, ip := range [][]byte{a.IP, a.Broadcast} {
			if own, ok := netip.AddrFromSlice(ip); ok {
				local = append(local, own.Unmap())
			}
		}
	}
	return local
}

// members gives what the family's set is to hold: prefixes, and whether each is an
// exception.
func (u *unknownPods) members(fam family) map[netip.Prefix]bool {
	want := map[netip.Prefix]bool{}
	for _, p := range u.ranges {
		if fam.holds(p.Addr()) && !p.IsSingleIP() {
			want[p] = false
		}
	}
	except := func(a netip.Addr) {
		if fam.holds(a) && slices.ContainsFunc(u.ranges, func(p netip.Prefix) bool { return p.Contains(a) }) {
			want[netip.PrefixFrom(a, a.BitLen())] = true
		}
	}
	for _, a := range u.known {
		except(a.Unmap().WithZone(""))
	}
	for _, a := range u.local {
		except(a)
	}
	for _, p := range u.ranges {
		if fam.holds(p.Addr()) && p.Addr().BitLen()-p.Bits() > 1 {
			except(p.Addr()) // the network's own address
			if p.Addr().Is4() {
				except(lastOf(p))
			}
		}
	}
	return want
}

// lastOf gives an IPv4 network's broadcast address.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|(1<<(32-p.Bits())-1))
	return netip.AddrFrom4(b)
}

// unknownFill is a set of unknown pods on its way to what it is to hold.
type unknownFill struct {
	set        memberSet
	have, want map[netip.Prefix]bool
	changed    int
}

// fill begins to bring the family's set up to date, which is made if it is missing.
// A nil fill, where there are no such sets or nothing is to be done, does nothing.
func (u *unknownPods) fill(set memberSet) (f *unknownFill, made bool, err error) {
	if !u.on || !u.stale {
		return nil, false, nil
	}
	have, ok, err := readUnknownSet(set)
	if err == nil && !ok {
		made, err = true, createUnknownSet(set)
	}
	if err != nil {
		return nil, false, err
	}
	return &unknownFill{set: set, have: have, want: u.members(set.fam)}, made, nil
}

// shut does what has more packets queued: to be done before what is known of a pod is
// taken from other sets.
func (f *unknownFill) shut() error {
	if f == nil {
		return nil
	}
	var gone, ranges []netip.Prefix
	for p, exception := range f.have {
		if wanted, ok := f.want[p]; exception && (!ok || !wanted) || !exception && wanted && ok {
			gone = append(gone, p)
			delete(f.have, p)
		}
	}
	for p, exception := range f.want {
		if _, there := f.have[p]; !exception && !there {
			ranges = append(ranges, p)
		}
	}
	f.changed += len(gone) + len(ranges)
	return errors.Join(
		changePrefixes(ipsetDel, f.set, gone, true),
		changePrefixes(ipsetAdd, f.set, ranges, false))
}

// open does what has fewer packets queued: to be done after what is known of a pod is
// in the other sets.
func (f *unknownFill) open() error {
	if f == nil {
		return nil
	}
	var known, gone []netip.Prefix
	for p, exception := range f.want {
		if _, there := f.have[p]; exception && !there {
			known = append(known, p)
		}
	}
	for p, exception := range f.have {
		if _, wanted := f.want[p]; !exception && !wanted {
			gone = append(gone, p)
		}
	}
	f.changed += len(known) + len(gone)
	return errors.Join(
		changePrefixes(ipsetAdd, f.set, known, true),
		changePrefixes(ipsetDel, f.set, gone, false))
}

// changes says in words what was done, if anything was.
func (f *unknownFill) changes() []string {
	if f == nil || f.changed == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%s: set %s differed in %d members", f.set.fam, f.set.name, f.changed)}
}

func createUnknownSet(set memberSet) error {
	af := uint8(unix.AF_INET)
	if set.fam == 6 {
		af = unix.AF_INET6
	}
	err := vish.IpsetCreate(set.name, unknownSetType, vish.IpsetCreateOptions{Family: af, MaxElements: setMaxMembers, Revision: unknownSetRevision})
	if errors.Is(err, nl.IPSetError(nl.IPSET_ERR_FIND_TYPE)) {
		return fmt.Errorf("%w: the set type %s is missing; run modprobe ip_set_hash_net, or switch off the holding of unknown pods' packets with --hold=0", ErrNoIpset, unknownSetType)
	}
	if err != nil {
		return fmt.Errorf("make ipset %s: %w", set.name, err)
	}
	return nil
}

// readUnknownSet gives the members of the family's set of unknown pods, each with
// whether it is an exception, and false if there is no such set. The netlink library
// can't tell exceptions.
func readUnknownSet(set memberSet) (members map[netip.Prefix]bool, ok bool, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, false, fmt.Errorf("open ipset netlink: %w", err)
	}
	defer conn.Close()
	ae := netlink.NewAttributeEncoder()
	ae.Uint8(ipsetAttrProtocol, ipsetProtocol)
	ae.String(ipsetAttrSetname, set.name)
	msgs, err := ipsetExecute(conn, ipsetList, netlink.Request|netlink.Dump, set.fam, ae)
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("list ipset %s: %w", set.name, err)
	}
	members = map[netip.Prefix]bool{}
	for _, m := range msgs {
		if err := readPrefixes(m.Data, set.fam, members); err != nil {
			return nil, false, fmt.Errorf("list ipset %s: %w", set.name, err)
		}
	}
	return members, true, nil
}

// readPrefixes adds the members that one message of a listing has.
func readPrefixes(b []byte, fam family, members map[netip.Prefix]bool) error {
	if len(b) < nfGenLen {
		return errShort
	}
	ad, err := netlink.NewAttributeDecoder(b[nfGenLen:])
	if err != nil {
		return err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case ipsetAttrTypename:
			if name := ad.String(); name != unknownSetType {
				return fmt.Errorf("it is of type %s: run portcullis cleanup, then start again", name)
			}
		case ipsetAttrADT:
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Nested(func(data *netlink.AttributeDecoder) error { return readPrefix(data, fam, members) })
				}
				return nil
			})
		}
	}
	return ad.Err()
}

func readPrefix(data *netlink.AttributeDecoder, fam family, members map[netip.Prefix]bool) error {
	var addr netip.Addr
	bits, exception := 0, false
	for data.Next() {
		switch data.Type() {
		case ipsetAttrIP:
			data.Nested(func(ip *netlink.AttributeDecoder) error {
				for ip.Next() {
					addr, _ = netip.AddrFromSlice(ip.Bytes())
				}
				return nil
			})
		case ipsetAttrCIDR:
			bits = int(data.Uint8())
		case ipsetAttrFlags:
			exception = data.Uint32()&ipsetFlagNomatch != 0
		}
	}
	p := netip.PrefixFrom(addr, bits)
	if !p.IsValid() || !fam.holds(addr) {
		return fmt.Errorf("member %v/%d is no %s prefix", addr, bits, fam)
	}
	members[p] = exception
	return nil
}

// More numbers of ipset's netlink protocol, as in setsbatch.go.
const (
	ipsetList = unix.NFNL_SUBSYS_IPSET<<8 | 7

	ipsetAttrTypename = 3
	ipsetAttrCIDR     = 3 // within data
	ipsetAttrFlags    = 8 // within data

	ipsetFlagNomatch = 1 << 2
)

// changePrefixes adds members to the family's set of unknown pods or deletes them, a
// thousand in one exchange, as changeMembers does with addresses.
func changePrefixes(typ netlink.HeaderType, set memberSet, members []netip.Prefix, exceptions bool) error {
	if len(members) == 0 {
		return nil
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open ipset netlink: %w", err)
	}
	defer conn.Close()
	for batch := range slices.Chunk(members, batchMembers) {
		if err := changePrefixBatch(conn, typ, set, batch, exceptions); err != nil {
			return fmt.Errorf("change ipset %s: %w", set.name, err)
		}
	}
	return nil
}

func changePrefixBatch(conn *netlink.Conn, typ netlink.HeaderType, set memberSet, members []netip.Prefix, exceptions bool) error {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Uint8(ipsetAttrProtocol, ipsetProtocol)
	ae.String(ipsetAttrSetname, set.name)
	ae.Uint32(ipsetAttrLineno, 0)
	ae.Nested(ipsetAttrADT, func(list *netlink.AttributeEncoder) error {
		for i, p := range members {
			list.Nested(ipsetAttrData, func(data *netlink.AttributeEncoder) error {
				data.Nested(ipsetAttrIP, func(ip *netlink.AttributeEncoder) error {
					kind := uint16(ipsetAttrIPv4)
					if p.Addr().Is6() {
						kind = ipsetAttrIPv6
					}
					ip.Bytes(unix.NLA_F_NET_BYTEORDER|kind, p.Addr().AsSlice())
					return nil
				})
				data.Uint8(ipsetAttrCIDR, uint8(p.Bits()))
				if exceptions {
					data.Uint32(unix.NLA_F_NET_BYTEORDER|ipsetAttrFlags, ipsetFlagNomatch)
				}
				data.Uint32(unix.NLA_F_NET_BYTEORDER|ipsetAttrLineno, uint32(i+1))
				return nil
			})
		}
		return nil
	})
	_, err := ipsetExecute(conn, typ, netlink.Request|netlink.Acknowledge, set.fam, ae)
	return err
}
