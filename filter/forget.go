package filter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// More numbers of the conntrack netlink protocol, as in kernelmarks.go.
const (
	ctMsgDelete = ctMsgNew + 2

	ctaID = 12

	ctaTupleIP = 1 // within a tuple

	ctaFilterOrigFlags  = 1 // within the filter
	ctaFilterReplyFlags = 2
)

// manyAddrs is from how many addresses on the whole table is asked for at once, and
// not what concerns each.
const manyAddrs = 8

// ForgetFlows makes the kernel forget the connections that have one of the addresses
// at an end, in either direction, before or after translation, and gives how many
// those were. What of them still comes is a new connection, and is judged.
//
// That is for addresses whose pod has gone. To the kernel a connection is five numbers,
// which don't change with the pod behind the address: what was accepted for the one
// would be let through to the next.
func ForgetFlows(addrs []netip.Addr) (forgotten int, err error) {
	if len(addrs) == 0 {
		return 0, nil
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("open conntrack netlink: %w", err)
	}
	defer conn.Close()
	// A dump walks a table that changes under it, and may miss entries: see
	// clearConnmarks.
	for range clearRounds {
		n, err := forgetRound(conn, addrs)
		forgotten += n
		if err != nil || n == 0 {
			return forgotten, err
		}
	}
	return forgotten, nil
}

// forgetRound deletes the connections that one look at the table finds.
func forgetRound(conn *netlink.Conn, addrs []netip.Addr) (deleted int, err error) {
	found, err := flowsOf(conn, addrs)
	if err != nil {
		return 0, fmt.Errorf("list connections: %w", err)
	}
	for _, f := range found {
		err := deleteFlow(conn, f)
		if errors.Is(err, os.ErrNotExist) {
			continue // it ended since, or had two of the addresses
		}
		if err != nil {
			return deleted, fmt.Errorf("forget a connection: %w", err)
		}
		deleted++
	}
	return deleted, nil
}

// flowsOf gives the kernel's messages about the connections of the addresses.
func flowsOf(conn *netlink.Conn, addrs []netip.Addr) (found []netlink.Message, err error) {
	wanted := map[string]bool{}
	whole := len(addrs) >= manyAddrs
	for _, a := range addrs {
		wanted[string(a.Unmap().AsSlice())] = true
		whole = whole || a.Unmap().Is6() // of which the kernel picks the wrong ones: see ctPick
	}
	var questions []netlink.Message
	for _, a := range addrs {
		if whole {
			break
		}
		for _, tuple := range []uint16{ctaTupleOrig, ctaTupleReply} {
			// The side's source alone: what comes from an address in one direction
			// goes to it in the other, unless it is translated, and then one of the
			// tuples still has it as its source.
			questions = append(questions, askFor(a.Unmap(), tuple))
		}
	}
	if len(questions) == 0 {
		questions = []netlink.Message{{Data: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}}}
	}
	for _, q := range questions {
		q.Header = netlink.Header{Type: ctMsgGet, Flags: netlink.Request | netlink.Dump}
		msgs, err := conn.Execute(q)
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			// Kernels before 5.8 know no filter and tell of all connections.
			if touches(m, wanted) {
				found = append(found, m)
			}
		}
	}
	return found, nil
}

// askFor asks for the connections whose tuple, of one direction, has the address as
// its source (CTA_FILTER, since Linux 5.8).
func askFor(a netip.Addr, tuple uint16) netlink.Message {
	const byIPSource = 1 // CTA_FILTER_FLAG(CTA_IP_SRC)
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.NativeEndian
	ae.Nested(tuple, func(t *netlink.AttributeEncoder) error {
		t.Nested(ctaTupleIP, func(ip *netlink.AttributeEncoder) error {
			if a.Is4() {
				ip.Bytes(1, a.AsSlice()) // CTA_IP_V4_SRC
			} else {
				ip.Bytes(3, a.AsSlice()) // CTA_IP_V6_SRC
			}
			return nil
		})
		return nil
	})
	ae.Nested(ctaFilter, func(f *netlink.AttributeEncoder) error {
		flags := map[uint16]uint32{tuple: byIPSource}
		f.Uint32(ctaFilterOrigFlags, flags[ctaTupleOrig])
		f.Uint32(ctaFilterReplyFlags, flags[ctaTupleReply])
		return nil
	})
	attrs, _ := ae.Encode() // what is encoded is of fixed and small sizes
	family := byte(unix.AF_INET)
	if a.Is6() {
		family = unix.AF_INET6
	}
	return netlink.Message{Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...)}
}

// touches tells whether one of a connection's four addresses is among the wanted.
func touches(m netlink.Message, wanted map[string]bool) (yes bool) {
	if len(m.Data) < nfGenLen {
		return false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[nfGenLen:])
	if err != nil {
		return false
	}
	for ad.Next() {
		if ad.Type() != ctaTupleOrig && ad.Type() != ctaTupleReply {
			continue
		}
		ad.Nested(func(tuple *netlink.AttributeDecoder) error {
			for tuple.Next() {
				if tuple.Type() != ctaTupleIP {
					continue
				}
				tuple.Nested(func(ip *netlink.AttributeDecoder) error {
					for ip.Next() {
						yes = yes || wanted[string(ip.Bytes())]
					}
					return nil
				})
			}
			return nil
		})
	}
	return yes
}

// deleteFlow deletes the connection that a dumped message is about, and not another
// that has come with its tuple since: the kernel compares the id.
func deleteFlow(conn *netlink.Conn, dumped netlink.Message) error {
	ad, err := netlink.NewAttributeDecoder(dumped.Data[nfGenLen:])
	if err != nil {
		return err
	}
	ae := netlink.NewAttributeEncoder()
	for ad.Next() {
		switch kind := ad.Type(); kind {
		case ctaTupleOrig:
			ae.Bytes(unix.NLA_F_NESTED|kind, bytes.Clone(ad.Bytes()))
		case ctaZone, ctaID:
			ae.Bytes(kind, bytes.Clone(ad.Bytes()))
		}
	}
	if err := ad.Err(); err != nil {
		return err
	}
	_, err = ctRequest(conn, ctMsgDelete, netlink.Request|netlink.Acknowledge, dumped.Data[0], ae)
	return err
}
