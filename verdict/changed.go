package verdict

import "net/netip"

// Changed lists the addresses that mean something else than in the snapshot that
// this one was made from: whose pod, or whose nodes, are others, or a pod's labels,
// its namespace's, or the policies that isolate it. A flow that is judged otherwise
// than by the snapshot before has an address among them at one end at least, since
// a decision depends on what its two ends mean and on nothing else. The order is
// none. Don't change the slice.
func (s *Snapshot) Changed() []netip.Addr { return s.changed }
