package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// setType and setMaxMembers are what the sets are made with. The limit is far
// beyond the pods of one node; a set takes memory only for the members it has.
const (
	setType       = "hash:ip"
	setMaxMembers = 262144
)

// memberSet is an ipset of ours: its family and its name.
type memberSet struct {
	fam  family
	name string
}

// isolated is the set of the family's isolated addresses, pods that of the
// addresses of all pods of this node.
func (f family) isolated() memberSet { return memberSet{f, "portcullis-" + strconv.Itoa(int(f))} }
func (f family) pods() memberSet     { return memberSet{f, "portcullis-pods-" + strconv.Itoa(int(f))} }

// at is the same set of the agent in a slot. Agents that hand over to each other
// have different slots, and so none ever writes to another's sets.
func (s memberSet) at(slot int) memberSet {
	if slot > 0 {
		s.name += "-" + strconv.Itoa(slot)
	}
	return s
}

// setsAt gives all sets of a family that an agent in a slot has.
func (f family) setsAt(slot int) []memberSet {
	return []memberSet{f.isolated().at(slot), f.unknown().at(slot), f.pods().at(slot)}
}

// set gives the name of the ipset that holds the family's isolated addresses.
func (f family) set() string { return f.isolated().name }

func (f family) holds(a netip.Addr) bool { return a.IsValid() && a.Is4() == (f == 4) }

// createSet makes a set, empty.
func createSet(s memberSet) error {
	af := uint8(unix.AF_INET)
	if s.fam == 6 {
		af = unix.AF_INET6
	}
	err := netlink.IpsetCreate(s.name, setType, netlink.IpsetCreateOptions{Family: af, MaxElements: setMaxMembers})
	if errors.Is(err, nl.IPSetError(nl.IPSET_ERR_FIND_TYPE)) {
		return fmt.Errorf("%w: the set type %s is missing; run modprobe ip_set_hash_ip", ErrNoIpset, setType)
	}
	if err != nil {
		return fmt.Errorf("make ipset %s: %w", s.name, err)
	}
	return nil
}

// readSet gives the members of a set, and false if there is no such
// set. A set of that name but of another type is an error.
func readSet(s memberSet) (members map[netip.Addr]bool, ok bool, err error) {
	res, err := netlink.IpsetList(s.name)
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("list ipset %s: %w", s.name, err)
	}
	v6 := res.Family == unix.AF_INET6
	if res.TypeName != setType || v6 != (s.fam == 6) {
		return nil, false, fmt.Errorf("ipset %s exists, but isn't of type %s for %s: run portcullis cleanup, then start again", s.name, setType, s.fam)
	}
	members = make(map[netip.Addr]bool, len(res.Entries))
	for _, e := range res.Entries {
		a, ok := netip.AddrFromSlice(e.IP)
		if !ok {
			return nil, false, fmt.Errorf("list ipset %s: member %v is no address", s.name, e.IP)
		}
		members[a.Unmap()] = true
	}
	return members, true, nil
}

// ensureSet makes a set if it is missing. The members of one that
// is there stay: they keep their pods shut until the new members are known.
func ensureSet(s memberSet) (made bool, err error) {
	_, ok, err := readSet(s)
	if err != nil || ok {
		return false, err
	}
	return true, createSet(s)
}

// fillSet makes a set hold exactly the wanted members: it adds what
// is missing, and only then removes what is too many. It is never emptied, so
// a member that stays is in it throughout. One member's failure doesn't keep
// the others out.
func fillSet(s memberSet, want map[netip.Addr]bool) (added, removed int, err error) {
	have, _, err := readSet(s)
	if err != nil {
		return 0, 0, err
	}
	var missing, excess []netip.Addr
	for a := range want {
		if !have[a] {
			missing = append(missing, a)
		}
	}
	for a := range have {
		if !want[a] {
			excess = append(excess, a)
		}
	}
	return len(missing), len(excess), errors.Join(
		changeMembers(ipsetAdd, s, missing),
		changeMembers(ipsetDel, s, excess))
}

// destroySet removes a set, if it is there. The kernel lets go of a
// deleted nftables rule, and of the set that it refers to, a little after the
// delete has returned; so a set in use is tried again for some two seconds.
func destroySet(s memberSet) error {
	var err error
	for range 100 {
		err = netlink.IpsetDestroy(s.name)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, nl.IPSetError(nl.IPSET_ERR_BUSY)) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("destroy ipset %s: %w", s.name, err)
}
