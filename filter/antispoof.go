package filter

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// spoofTable is the name of the nftables tables that drop what leaves a pod's
// interface with an address that isn't the pod's: one of the inet family, for routed
// pods, and one of the bridge family, which sees a bridge's ports. iptables has no
// way to look a bridge's port up in a set (hash:net,iface knows ports, but its match
// can't ask for them), and a rule for each pod is what sets are there to avoid.
const spoofTable = "portcullis-spoof"

// PodLink is a pod's interface on the node's side, or a bridge's port, and the
// addresses that may be the source of what comes in by it.
type PodLink struct {
	Link  string
	Addrs []netip.Addr
}

// AntiSpoof keeps those tables, in the network namespace of the calling thread. Its
// methods may be called from several goroutines.
type AntiSpoof struct {
	log *slog.Logger

	mu      sync.Mutex
	want    spoofMembers
	built   bool
	dropped uint64 // counted by tables that are gone
}

// NewAntiSpoof changes nothing.
func NewAntiSpoof(log *slog.Logger) *AntiSpoof {
	return &AntiSpoof{log: log, want: membersOf(nil)}
}

// spoofMembers are a table's sets, by name: their elements, as the kernel has them.
type spoofMembers map[string]map[string]bool

// The sets of a table. An element of the pairs is an interface's name and an address.
const (
	spoofLinks  = "links"
	spoofPairs4 = "pairs4"
	spoofPairs6 = "pairs6"
)

var spoofSets = []struct {
	name string
	key  nftables.SetDatatype
}{
	{spoofPairs4, nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)},
	{spoofPairs6, nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIP6Addr)},
	{spoofLinks, nftables.TypeIFName},
}

// membersOf gives the members that links make.
func membersOf(links []PodLink) spoofMembers {
	m := spoofMembers{spoofLinks: {}, spoofPairs4: {}, spoofPairs6: {}}
	for _, l := range links {
		if len(l.Link) >= unix.IFNAMSIZ || l.Link == "" {
			continue // no interface has such a name
		}
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, l.Link)
		m[spoofLinks][string(name)] = true
		for _, a := range l.Addrs {
			pairs := spoofPairs4
			if a = a.Unmap(); a.Is6() {
				pairs = spoofPairs6
			}
			m[pairs][string(name)+string(a.AsSlice())] = true
		}
	}
	return m
}

// Set makes the tables hold exactly these interfaces, by difference and in one
// transaction each. What comes in by others isn't looked at.
func (s *AntiSpoof) Set(links []PodLink) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want = membersOf(links)
	_, err := s.mend()
	return err
}

// Repair compares the tables with what Set was last given, mends what others have
// altered and logs it; it gives a sentence for each table that was wrong.
func (s *AntiSpoof) Repair() (repaired []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.built {
		return nil, nil
	}
	if repaired, err = s.mend(); len(repaired) > 0 {
		s.log.Warn("anti-spoofing repaired", "repaired", repaired)
	}
	return repaired, err
}

// spoofFamilies are those of the two tables.
var spoofFamilies = []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyBridge}

// mend brings both tables up to date. The caller holds s.mu.
func (s *AntiSpoof) mend() (mended []string, err error) {
	var errs []error
	for _, fam := range spoofFamilies {
		changed, err := s.mendTable(spoofTableOf(fam))
		if err != nil {
			errs = append(errs, fmt.Errorf("anti-spoofing: nftables, table %s %s: %w", spoofFamilyName(fam), spoofTable, err))
		} else if changed {
			mended = append(mended, "table "+spoofFamilyName(fam)+" "+spoofTable)
		}
	}
	s.built = s.built || len(errs) == 0
	return mended, errors.Join(errs...)
}

func spoofTableOf(fam nftables.TableFamily) *nftables.Table {
	return &nftables.Table{Name: spoofTable, Family: fam}
}

func spoofFamilyName(fam nftables.TableFamily) string {
	if fam == nftables.TableFamilyBridge {
		return "bridge"
	}
	return "inet"
}

// mendTable brings a table up to date: its members where it is whole, and else all of
// it, in one transaction.
func (s *AntiSpoof) mendTable(t *nftables.Table) (changed bool, err error) {
	conn, err := nftables.New()
	if err != nil {
		return false, err
	}
	have, dropped, whole := readSpoof(conn, t)
	if !whole {
		s.dropped += dropped
		conn.AddTable(t) // so that there is one to delete
		conn.DelTable(t)
		if err := s.build(conn, t); err != nil {
			return false, err
		}
		return true, conn.Flush()
	}
	for _, set := range spoofSets {
		add, remove := spoofDifference(s.want[set.name], have[set.name]), spoofDifference(have[set.name], s.want[set.name])
		changed = changed || len(add)+len(remove) > 0
		in := spoofSet(t, set.name, set.key)
		if err := eachChunk(remove, func(some []nftables.SetElement) error { return conn.SetDeleteElements(in, some) }); err != nil {
			return false, err
		}
		if err := eachChunk(add, func(some []nftables.SetElement) error { return conn.SetAddElements(in, some) }); err != nil {
			return false, err
		}
	}
	if !changed {
		return false, nil
	}
	return true, conn.Flush()
}

func spoofSet(t *nftables.Table, name string, key nftables.SetDatatype) *nftables.Set {
	return &nftables.Set{Table: t, Name: name, KeyType: key, Concatenation: name != spoofLinks}
}

// spoofDifference gives the elements of one set that another hasn't.
func spoofDifference(of, without map[string]bool) (elements []nftables.SetElement) {
	for key := range of {
		if !without[key] {
			elements = append(elements, nftables.SetElement{Key: []byte(key)})
		}
	}
	return elements
}

// eachChunk keeps a message of elements below the 64 KiB of a netlink attribute.
func eachChunk(elements []nftables.SetElement, do func([]nftables.SetElement) error) error {
	for some := range slices.Chunk(elements, 500) {
		if err := do(some); err != nil {
			return err
		}
	}
	return nil
}

// build makes a table's sets, chain and rules.
func (s *AntiSpoof) build(conn *nftables.Conn, t *nftables.Table) error {
	conn.AddTable(t)
	for _, set := range spoofSets {
		in := spoofSet(t, set.name, set.key)
		if err := conn.AddSet(in, nil); err != nil {
			return err
		}
		if err := eachChunk(spoofDifference(s.want[set.name], nil), func(some []nftables.SetElement) error { return conn.SetAddElements(in, some) }); err != nil {
			return err
		}
	}
	accept := nftables.ChainPolicyAccept
	chain := conn.AddChain(&nftables.Chain{
		Name: spoofChain, Table: t, Type: nftables.ChainTypeFilter, Policy: &accept,
		// Before conntrack, which is to remember nothing of a forgery.
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
	})
	for _, r := range spoofRules(t.Family) {
		conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: r.exprs, UserData: []byte(r.name)})
	}
	return nil
}

const spoofChain = "source"

// readSpoof reads a table: its members, how many packets it has dropped, and whether
// it is whole.
func readSpoof(conn *nftables.Conn, t *nftables.Table) (have spoofMembers, dropped uint64, whole bool) {
	// Whatever can't be read isn't there, or the wrong way.
	rules, err := conn.GetRules(t, &nftables.Chain{Name: spoofChain, Table: t})
	if err != nil {
		return nil, 0, false
	}
	for _, r := range rules {
		dropped += droppedBy(r)
	}
	want := spoofRules(t.Family)
	if !slices.EqualFunc(rules, want, func(r *nftables.Rule, w spoofRule) bool {
		return bytes.Equal(bytes.TrimRight(r.UserData, "\x00"), []byte(w.name)) && len(r.Exprs) == len(w.exprs)
	}) {
		return nil, dropped, false
	}
	have = spoofMembers{}
	for _, set := range spoofSets {
		elements, err := conn.GetSetElements(spoofSet(t, set.name, set.key))
		if err != nil {
			return nil, dropped, false
		}
		have[set.name] = map[string]bool{}
		for _, e := range elements {
			have[set.name][string(e.Key)] = true
		}
	}
	return have, dropped, true
}

// Dropped counts the packets that were dropped.
func (s *AntiSpoof) Dropped() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.dropped
	if !s.built {
		return n
	}
	conn, err := nftables.New()
	if err != nil {
		return n
	}
	for _, fam := range spoofFamilies {
		t := spoofTableOf(fam)
		rules, err := conn.GetRules(t, &nftables.Chain{Name: spoofChain, Table: t})
		if err != nil {
			continue
		}
		for _, r := range rules {
			n += droppedBy(r)
		}
	}
	return n
}

// Links gives how many interfaces are watched.
func (s *AntiSpoof) Links() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.want[spoofLinks])
}

// RemoveAntiSpoof takes the tables away. That there are none is no error, nor is a
// kernel without nftables.
func RemoveAntiSpoof() error {
	conn, err := nftables.New()
	if err != nil {
		return nil
	}
	var errs []error
	for _, fam := range spoofFamilies {
		tables, err := conn.ListTablesOfFamily(fam)
		if err != nil || !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == spoofTable }) {
			continue
		}
		conn.DelTable(spoofTableOf(fam))
		if err := conn.Flush(); err != nil {
			errs = append(errs, fmt.Errorf("delete the nftables table %s %s: %w", spoofFamilyName(fam), spoofTable, err))
		}
	}
	return errors.Join(errs...)
}
