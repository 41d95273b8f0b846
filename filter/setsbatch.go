package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Numbers of the ipset netlink protocol, from the kernel's
// include/uapi/linux/netfilter/ipset/ip_set.h.
const (
	ipsetAdd = unix.NFNL_SUBSYS_IPSET<<8 | 9
	ipsetDel = unix.NFNL_SUBSYS_IPSET<<8 | 10

	ipsetAttrProtocol  = 1
	ipsetAttrSetname   = 2
	ipsetAttrListFlags = 6
	ipsetAttrData      = 7
	ipsetAttrADT       = 8
	ipsetAttrLineno    = 9
	ipsetAttrIP        = 1 // within data
	ipsetAttrIPv4      = 1 // within IP
	ipsetAttrIPv6      = 2

	ipsetAttrElements = 24 // within data, of a listing

	ipsetListHeader = 1 << 2 // a flag of listings: without the members

	ipsetErrHashFull = 4352 // of the hash types

	ipsetProtocol = 6 // the oldest that kernels still speak
)

// batchMembers is how many members one message carries at most: a nested
// attribute's length has 16 bits, and a member takes up to 40 bytes.
const batchMembers = 1000

// changeMembers adds members to a set or deletes them from it, a
// thousand in one exchange. A member that is there already, or isn't, is no error.
// One that the kernel refuses is named, and doesn't keep the others out.
func changeMembers(typ netlink.HeaderType, set memberSet, members []netip.Addr) error {
	if len(members) == 0 {
		return nil
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open ipset netlink: %w", err)
	}
	defer conn.Close()
	var errs []error
	for batch := range slices.Chunk(members, batchMembers) {
		if changeBatch(conn, typ, set, batch) == nil {
			continue
		}
		for _, a := range batch { // one by one, since the kernel stops at the first that it refuses
			err := changeBatch(conn, typ, set, []netip.Addr{a})
			switch {
			case err == nil:
			case typ == ipsetAdd:
				errs = append(errs, fmt.Errorf("add %s to ipset %s: %w", a, set.name, err))
			default:
				errs = append(errs, fmt.Errorf("remove %s from ipset %s: %w", a, set.name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// changeBatch sends one message. Without NLM_F_EXCL the kernel finds nothing
// wrong with what is already as it is asked to be.
func changeBatch(conn *netlink.Conn, typ netlink.HeaderType, set memberSet, members []netip.Addr) error {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Uint8(ipsetAttrProtocol, ipsetProtocol)
	ae.String(ipsetAttrSetname, set.name)
	ae.Uint32(ipsetAttrLineno, 0) // must be there: the kernel says in it which member it refused
	ae.Nested(ipsetAttrADT, func(list *netlink.AttributeEncoder) error {
		for i, a := range members {
			list.Nested(ipsetAttrData, func(data *netlink.AttributeEncoder) error {
				data.Nested(ipsetAttrIP, func(ip *netlink.AttributeEncoder) error {
					if a.Is4() {
						ip.Bytes(unix.NLA_F_NET_BYTEORDER|ipsetAttrIPv4, a.AsSlice())
					} else {
						ip.Bytes(unix.NLA_F_NET_BYTEORDER|ipsetAttrIPv6, a.AsSlice())
					}
					return nil
				})
				data.Uint32(unix.NLA_F_NET_BYTEORDER|ipsetAttrLineno, uint32(i+1))
				return nil
			})
		}
		return nil
	})
	_, err := ipsetExecute(conn, typ, netlink.Request|netlink.Acknowledge, set.fam, ae)
	return err
}

// ipsetExecute sends one request and gives the answers. ipset's own error numbers
// become words.
func ipsetExecute(conn *netlink.Conn, typ netlink.HeaderType, flags netlink.HeaderFlags, fam family, ae *netlink.AttributeEncoder) ([]netlink.Message, error) {
	attrs, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	af := byte(unix.AF_INET)
	if fam == 6 {
		af = unix.AF_INET6
	}
	msgs, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: typ, Flags: flags},
		Data:   append([]byte{af, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	errno := syscall.Errno(0)
	switch {
	case errors.As(err, &errno) && errno == ipsetErrHashFull:
		return nil, errors.New("the set is full")
	case errno >= nl.IPSET_ERR_PRIVATE:
		return nil, nl.IPSetError(errno)
	}
	return msgs, err
}
