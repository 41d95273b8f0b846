package verdict

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// addrKey is an address as two numbers, in which IPv4 is 4-in-6. (IPv6 addresses
// that are 4-in-6 don't come here, they are IPv4 wherever they enter.)
type addrKey struct{ hi, lo uint64 }

// keyOf gives an address's key. The zero Addr and the IPv6 unspecified address
// have the same one.
//
// Addr.As16 would do for all, but its result is copied sixteen bytes at once just
// after it was written eight at once, which a processor doesn't forward: 10 ns, the
// most of a decision. AsSlice is inlined and stays on the stack.
func keyOf(a netip.Addr) addrKey {
	if a.Is4() {
		b := a.As4()
		return addrKey{0, 0xffff<<32 | uint64(binary.BigEndian.Uint32(b[:]))}
	}
	if !a.IsValid() {
		return addrKey{}
	}
	b := a.AsSlice()
	return addrKey{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (k *addrKey) is4() bool { return k.hi == 0 && k.lo>>32 == 0xffff }

// addr gives the address of a key.
func (k *addrKey) addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
	return netip.AddrFrom16(b).Unmap()
}

// hash spreads addresses over slots and stamps, which use its upper bits.
func (k *addrKey) hash() uint64 {
	const odd = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio
	return (k.hi*odd ^ k.lo) * odd
}

// end is all that a decision reads of an address, in one cache line: a decision
// waits for memory more than for anything else, and what it needs next is found
// from here without another step in between.
type end struct {
	addrKey
	endpoint        *Endpoint // nil where the address is no pod's
	ingress, egress *match    // nil where the pod isn't judged, or isn't isolated
	nodes           *[]string // the nodes that have the address, nil for none
	namespace       uint32
	labels          uint32
	names           uint32 // a bit per named port, see nameBit
	judged, used    bool
	auditOnly       bool
}

// nobody is the end of an address that nobody has.
var nobody end

// newEnd gives the end of an address. It is unused if the address is neither a
// pod's nor a node's, whose names are nil then.
func newEnd(k addrKey, pod *Endpoint, nodes *[]string) end {
	e := end{addrKey: k, nodes: nodes, used: pod != nil || nodes != nil}
	if pod == nil {
		return e
	}
	e.endpoint, e.judged, e.auditOnly = pod, pod.Judged, pod.AuditOnly
	e.namespace, e.labels = pod.NamespaceIndex, pod.LabelsIndex
	if pod.Judged {
		e.ingress, e.egress = pod.Ingress.matchOf(), pod.Egress.matchOf()
	}
	for _, n := range pod.Ports {
		e.names |= nameBit(n.Proto, n.Port)
	}
	return e
}

// nameBit is where end.names has a port, and a few others with it: most ports
// have no name, and a decision needn't read the names to know it.
func nameBit(proto Protocol, port uint16) uint32 {
	return 1 << ((uint32(port) ^ uint32(port)>>5 ^ uint32(proto)) & 31)
}

// pageEnds is how many ends are copied together when one of them changes: few, since
// a policy of a thousand pods changes ends all over the table; but all pages' pointers
// are copied with each change, and lie on a decision's way.
const pageEnds = 16

type page [pageEnds]end

// endTable finds the end of an address: a hash table with open addressing, whose
// slots are the ends themselves, in pages. It is immutable; edit makes another
// one that shares the pages that don't change.
type endTable struct {
	pages []*page // a power of two
	shift uint    // a hash shifted right by it is the first slot to look into
	count int
}

func newEndTable(pages int) endTable {
	t := endTable{pages: make([]*page, pages), shift: 64}
	for i := range t.pages {
		t.pages[i] = new(page)
	}
	for slots := pages * pageEnds; slots > 1; slots >>= 1 {
		t.shift--
	}
	return t
}

// at gives a slot; the one after the last is the first.
func (t *endTable) at(slot uint64) *end {
	return &t.pages[slot/pageEnds&uint64(len(t.pages)-1)][slot%pageEnds]
}

// find gives the end of an address, nobody if it isn't in the table.
func (t *endTable) find(k *addrKey) *end {
	for slot := k.hash() >> t.shift; ; slot++ {
		e := t.at(slot)
		if e.addrKey == *k && e.used {
			return e
		}
		if !e.used {
			return &nobody
		}
	}
}

// each calls yield with all ends.
func (t *endTable) each(yield func(*end)) {
	for _, p := range t.pages {
		for i := range p {
			if p[i].used {
				yield(&p[i])
			}
		}
	}
}

// endEdit is a table in the making, which copies a page before it first writes
// to it.
type endEdit struct {
	endTable
	shared []*page // of the table that was there before, nil for none
}

func (t *endTable) edit() *endEdit {
	e := &endEdit{endTable: *t, shared: t.pages}
	e.pages = slices.Clone(t.pages)
	return e
}

// write gives a slot to write to.
func (t *endEdit) write(slot uint64) *end {
	i := slot / pageEnds & uint64(len(t.pages)-1)
	if t.shared != nil && t.pages[i] == t.shared[i] {
		p := *t.pages[i]
		t.pages[i] = &p
	}
	return &t.pages[i][slot%pageEnds]
}

// put puts an end in the place of the one of its address, which an unused end
// takes away.
func (t *endEdit) put(e end) {
	slot := e.hash() >> t.shift
	for ; ; slot++ {
		at := t.at(slot)
		if !at.used {
			break
		}
		if at.addrKey == e.addrKey {
			if e.used {
				*t.write(slot) = e
			} else {
				t.remove(slot)
			}
			return
		}
	}
	if !e.used {
		return
	}
	*t.write(slot) = e
	t.count++
	if slots := len(t.pages) * pageEnds; 3*t.count > 2*slots {
		t.grow()
	}
}

// remove empties a slot, and moves up the ends behind it that would have been
// put there.
func (t *endEdit) remove(slot uint64) {
	t.count--
	mask := uint64(len(t.pages)*pageEnds - 1)
	for next := slot + 1; t.at(next).used; next++ {
		e := t.at(next)
		home := e.hash() >> t.shift
		if (next-home)&mask >= (next-slot)&mask { // its search comes by slot
			*t.write(slot) = *e
			slot = next
		}
	}
	*t.write(slot) = end{}
}

// grow doubles the table.
func (t *endEdit) grow() {
	next := endEdit{endTable: newEndTable(2 * len(t.pages))}
	t.each(func(e *end) { next.put(*e) })
	*t = next
}
