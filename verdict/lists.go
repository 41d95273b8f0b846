package verdict

import (
	"net/netip"
	"slices"
	"sync/atomic"
)

// addrList is a sorted list of addresses, made when it is first asked for.
// Snapshots between which it doesn't change share it.
type addrList struct {
	made atomic.Pointer[[]netip.Addr]
}

// list gives the list, of the ends that are in it.
func (s *Snapshot) list(l *addrList, in func(*end) bool) []netip.Addr {
	if made := l.made.Load(); made != nil {
		return *made
	}
	var addrs []netip.Addr
	s.ends.each(func(e *end) {
		if in(e) {
			addrs = append(addrs, e.addr())
		}
	})
	slices.SortFunc(addrs, netip.Addr.Compare)
	l.made.Store(&addrs) // if two make it at once, both make the same
	return addrs
}

// IsolatedAddrs lists the addresses of the judged pods that are isolated in
// some direction, sorted: those whose packets the kernel has to queue. The slice
// belongs to the snapshot, and is that of the one before if it hasn't changed.
func (s *Snapshot) IsolatedAddrs() []netip.Addr { return s.list(s.isolated, (*end).isIsolated) }

// JudgedAddrs lists the addresses of all judged pods, isolated or not, sorted.
// The slice belongs to the snapshot, as that of IsolatedAddrs.
func (s *Snapshot) JudgedAddrs() []netip.Addr { return s.list(s.judged, (*end).isJudged) }

// isIsolated tells whether some policy isolates the end's pod and is judged here.
func (e *end) isIsolated() bool { return e.ingress != nil || e.egress != nil }

func (e *end) isJudged() bool { return e.judged }

// addrChange is what comes to a list of addresses, and what goes.
type addrChange struct{ come, gone []netip.Addr }

// note takes in an address that was or wasn't in the list, and now is or isn't.
func (c *addrChange) note(a netip.Addr, was, is bool) {
	switch {
	case is && !was:
		c.come = append(c.come, a)
	case was && !is:
		c.gone = append(c.gone, a)
	}
}

// mergeLimit is the length up to which a changed list is made from the one
// before, at once. That of one node's pods is shorter; a list of a whole
// cluster's would be copied with each change, and nobody may ask for it.
const mergeLimit = 4096

// apply gives the list after the change: the same one if nothing has changed.
func (c *addrChange) apply(before *addrList) *addrList {
	if len(c.come) == 0 && len(c.gone) == 0 {
		return before
	}
	after := new(addrList)
	if made := before.made.Load(); made != nil && len(*made)+len(c.come) <= mergeLimit {
		merged := c.merge(*made)
		after.made.Store(&merged)
	}
	return after
}

// merge makes the changed list, sorted as the one before.
func (c *addrChange) merge(list []netip.Addr) []netip.Addr {
	slices.SortFunc(c.come, netip.Addr.Compare)
	slices.SortFunc(c.gone, netip.Addr.Compare)
	come, gone := c.come, c.gone
	changed := make([]netip.Addr, 0, len(list)+len(come)-len(gone))
	for _, a := range list {
		for len(come) > 0 && come[0].Less(a) {
			changed, come = append(changed, come[0]), come[1:]
		}
		if len(gone) > 0 && gone[0] == a {
			gone = gone[1:]
			continue
		}
		changed = append(changed, a)
	}
	return append(changed, come...)
}
