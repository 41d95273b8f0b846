package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strconv"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// DefaultMarkBits are the two bits of packet and connection marks that
// Portcullis uses unless told otherwise. None of the programs in markOwners
// uses them.
const DefaultMarkBits uint32 = 0x3000

// markOwners are the mark bits that programs commonly found on a node take for
// themselves, by their own documentation.
var markOwners = []struct {
	name string
	bits uint32
}{
	{"kube-proxy", 0x0000c000},
	{"Cilium", 0x00000f00},
	{"Weave and kube-router", 0x00070000},
	{"Calico", 0xffff0000},
}

// ParseMarkBits reads two mark bits, such as "0x3000". Anything but exactly
// two bits of a 32-bit mark is an error.
func ParseMarkBits(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		return 0, fmt.Errorf("mark bits %q are not a 32-bit number: give exactly two bits, such as 0x%x", s, DefaultMarkBits)
	}
	if err := checkMarkBits(uint32(n)); err != nil {
		return 0, err
	}
	return uint32(n), nil
}

func checkMarkBits(n uint32) error {
	if c := bits.OnesCount32(n); c != 2 {
		return fmt.Errorf("mark bits 0x%x have %d bits set: give exactly two, such as 0x%x", n, c, DefaultMarkBits)
	}
	return nil
}

// AcceptedMark gives the bit that says "judged and accepted": the lower of the
// two mark bits. The verdict sets it on the packet, the rules save it to the
// connection.
func AcceptedMark(markBits uint32) uint32 { return markBits & -markBits }

// RevokedMark gives the bit that says "no longer allowed": the higher of the
// two mark bits. On a connection's mark it drops every further packet.
func RevokedMark(markBits uint32) uint32 { return markBits &^ AcceptedMark(markBits) }

// markRivals names the programs that are known to use one of the mark bits.
func markRivals(markBits uint32) []string {
	var names []string
	for _, o := range markOwners {
		if o.bits&markBits != 0 {
			names = append(names, o.name)
		}
	}
	return names
}

// Numbers of the conntrack netlink protocol, from the kernel's
// include/uapi/linux/netfilter/nfnetlink_conntrack.h.
const (
	ctMsgNew = unix.NFNL_SUBSYS_CTNETLINK << 8
	ctMsgGet = ctMsgNew + 1

	ctaTupleOrig = 1
	ctaMark      = 8
	ctaZone      = 18
	ctaMarkMask  = 21
)

// clearConnmarks takes the mark bits off every connection that the kernel
// tracks in this network namespace and gives how many had one. The other bits
// of their marks are left to their owners.
//
// It speaks netlink itself because a conntrack library that leaves out a zero
// mark can't clear one, and because CTA_MARK_MASK lets the kernel clear just
// these bits, without a race against those who set others.
func clearConnmarks(markBits uint32) (cleared int, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("open conntrack netlink: %w", err)
	}
	defer conn.Close()
	// A dump walks a table that changes under it, and may miss entries: so
	// until one finds nothing more.
	for range clearRounds {
		n, err := clearRound(conn, markBits)
		cleared += n
		if err != nil || n == 0 {
			return cleared, err
		}
	}
	return cleared, nil
}

// clearRounds bounds the dumps: whatever is found that often is being marked
// anew all the time, by a running agent.
const clearRounds = 5

// clearRound clears the marks that one dump finds.
func clearRound(conn *netlink.Conn, markBits uint32) (cleared int, err error) {
	// The kernel picks by "mark & mask == mark", so one bit at a time.
	for rest := markBits; rest != 0; rest &= rest - 1 {
		bit := rest & -rest
		marked, err := dumpMarked(conn, bit)
		if err != nil {
			return cleared, fmt.Errorf("list marked connections: %w", err)
		}
		for _, m := range marked {
			err := clearMark(conn, m, markBits)
			if errors.Is(err, os.ErrNotExist) {
				continue // it ended since the dump
			}
			if err != nil {
				return cleared, fmt.Errorf("clear a connection's mark: %w", err)
			}
			cleared++
		}
	}
	return cleared, nil
}

// dumpMarked gives the kernel's messages about the connections of both
// families whose mark has the bit.
func dumpMarked(conn *netlink.Conn, bit uint32) ([]netlink.Message, error) {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Uint32(ctaMark, bit)
	ae.Uint32(ctaMarkMask, bit)
	return ctRequest(conn, ctMsgGet, netlink.Request|netlink.Dump, unix.AF_UNSPEC, ae)
}

// clearMark clears the mark bits of the connection that a dumped message is
// about. The tuple goes back to the kernel as the bytes that came from it, so
// that every protocol works, known here or not.
func clearMark(conn *netlink.Conn, dumped netlink.Message, markBits uint32) error {
	if len(dumped.Data) < 4 {
		return errors.New("message too short")
	}
	ad, err := netlink.NewAttributeDecoder(dumped.Data[4:])
	if err != nil {
		return err
	}
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case ctaTupleOrig:
			ae.Bytes(unix.NLA_F_NESTED|ctaTupleOrig, ad.Bytes())
		case ctaZone:
			ae.Bytes(ctaZone, ad.Bytes())
		}
	}
	if err := ad.Err(); err != nil {
		return err
	}
	ae.Uint32(ctaMark, 0)
	ae.Uint32(ctaMarkMask, markBits)
	_, err = ctRequest(conn, ctMsgNew, netlink.Request|netlink.Acknowledge, dumped.Data[0], ae)
	return err
}

// ctRequest sends one conntrack request: the four bytes of struct nfgenmsg
// (family, version 0, resource 0), then the attributes.
func ctRequest(conn *netlink.Conn, typ netlink.HeaderType, flags netlink.HeaderFlags, family byte, ae *netlink.AttributeEncoder) ([]netlink.Message, error) {
	attrs, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	return conn.Execute(netlink.Message{
		Header: netlink.Header{Type: typ, Flags: flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
}
