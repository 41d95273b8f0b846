package filter

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Numbers of the nf_tables netlink protocol, from the kernel's
// include/uapi/linux/netfilter/nf_tables.h.
const (
	nftMsgNewGen = unix.NFNL_SUBSYS_NFTABLES<<8 | 15
	nftMsgGetGen = unix.NFNL_SUBSYS_NFTABLES<<8 | 16

	nftaGenID = 1
	nftaTable = 1 // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, …
)

// nftGeneration gives the number of the nf_tables ruleset that is in force in the
// network namespace of the calling thread, of all families and tables. Each change
// that anybody commits makes it another one (nf_tables_commit), and nothing else does.
// It is never 0.
func nftGeneration() (uint32, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("open nf_tables netlink: %w", err)
	}
	defer conn.Close()
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: nftMsgGetGen, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of the nf_tables ruleset: %w", err)
	}
	for _, m := range answers {
		if m.Header.Type != nftMsgNewGen || len(m.Data) < nfGenLen {
			continue
		}
		attrs, err := netlink.UnmarshalAttributes(m.Data[nfGenLen:])
		if err != nil {
			return 0, fmt.Errorf("generation of the nf_tables ruleset: %w", err)
		}
		for _, a := range attrs {
			if a.Type == nftaGenID && len(a.Data) == 4 {
				return binary.BigEndian.Uint32(a.Data), nil
			}
		}
	}
	return 0, errors.New("the kernel doesn't tell the generation of the nf_tables ruleset")
}
