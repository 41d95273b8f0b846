// Package verdict decides whether NetworkPolicy lets a connection through.
//
// It is pure: it knows addresses, ports, compiled tables and caches, and it
// knows nothing of Kubernetes, of the kernel or of the time. A Snapshot is
// immutable once built and is swapped whole behind one atomic pointer, so that
// any number of workers may read it without a lock.
package verdict

import (
	"net/netip"
	"strconv"
)

// Protocol is an IP protocol number, as in the IPv4 header's protocol field or
// the last next-header field of an IPv6 header chain.
type Protocol uint8

// The protocols that policies, or the exemptions from them, know by name.
const (
	ICMP   Protocol = 1
	TCP    Protocol = 6
	UDP    Protocol = 17
	ICMPv6 Protocol = 58
	SCTP   Protocol = 132
)

// HasPorts tells whether NetworkPolicy's port rules can match the protocol:
// the API knows ports of TCP, UDP and SCTP only.
func (p Protocol) HasPorts() bool { return p == TCP || p == UDP || p == SCTP }

// String gives the name that the API and users write ("TCP"), or the number.
func (p Protocol) String() string {
	switch p {
	case ICMP:
		return "ICMP"
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case ICMPv6:
		return "ICMPv6"
	case SCTP:
		return "SCTP"
	}
	return strconv.Itoa(int(p))
}

// Flow is what a policy decision may look at in a connection's first packet,
// after DNAT and before SNAT. Addresses are unmapped (never 4-in-6). Ports are
// zero for protocols without ports; ICMPType and ICMPCode are zero for
// everything but ICMP and ICMPv6.
type Flow struct {
	Src, Dst netip.Addr
	SrcPort  uint16
	DstPort  uint16
	Proto    Protocol
	ICMPType uint8
	ICMPCode uint8

	// Defect is ReasonNone for a packet that was understood whole, or the
	// reason why it wasn't (ReasonTruncated, ReasonFragment,
	// ReasonMalformed). A flow with a defect is denied when an end of it is
	// isolated, whatever the rules say. If not even the addresses could be
	// read, Src and Dst are the zero Addr, and the flow is always denied.
	Defect Reason
}

// Verdict is what becomes of a connection. The zero value denies, so that
// whatever is forgotten keeps the gate shut.
type Verdict uint8

// The verdicts. WouldDeny is a denial that isn't carried out, since whoever it
// protects is in audit-only mode: the connection passes.
const (
	Deny Verdict = iota
	Allow
	WouldDeny
	verdictCount
)

// VerdictCount is how many verdicts there are, for those who count by verdict.
const VerdictCount = int(verdictCount)

// Verdicts lists every verdict in a fixed order.
func Verdicts() []Verdict { return []Verdict{Deny, Allow, WouldDeny} }

// Passes tells whether the connection is let through.
func (v Verdict) Passes() bool { return v == Allow || v == WouldDeny }

// String gives "allow", "deny" or "would-deny".
func (v Verdict) String() string {
	switch v {
	case Allow:
		return "allow"
	case WouldDeny:
		return "would-deny"
	}
	return "deny"
}

// Reason says in one word of a closed list why a verdict fell as it did.
type Reason uint8

// The reasons, those of an allow first.
const (
	ReasonNone        Reason = iota
	ReasonNotIsolated        // allow: no judged end is isolated in its direction
	ReasonRule               // allow: each isolated end has a rule that admits it
	ReasonSelf               // allow: a pod always reaches itself
	ReasonOwnNode            // allow: between a node and its own pods
	ReasonNeighbour          // allow: ICMPv6 neighbour discovery, types 133-137
	ReasonNoRule             // deny: an isolated end, and no rule admits it
	ReasonTruncated          // deny: the packet ends before its transport header does
	ReasonFragment           // deny: a fragment, whose ports can't be known or trusted
	ReasonMalformed          // deny: not an IP packet, or lengths that contradict each other
	ReasonNotReady           // deny: no policy is compiled yet
	ReasonForged             // deny: in a pod's own name, but from somewhere else
	ReasonUnknownPod         // either: an end is a pod of this node that nobody knows yet
)

var reasonWords = [...]string{
	ReasonNone:        "none",
	ReasonNotIsolated: "not-isolated",
	ReasonRule:        "rule",
	ReasonSelf:        "self",
	ReasonOwnNode:     "own-node",
	ReasonNeighbour:   "neighbour-discovery",
	ReasonNoRule:      "no-rule",
	ReasonTruncated:   "truncated",
	ReasonFragment:    "fragment",
	ReasonMalformed:   "malformed",
	ReasonNotReady:    "not-ready",
	ReasonForged:      "forged",
	ReasonUnknownPod:  "unknown-pod",
}

// String gives the reason's word, as the decision log and explain print it.
func (r Reason) String() string {
	if int(r) < len(reasonWords) {
		return reasonWords[r]
	}
	return "unknown"
}

// Reasons lists every reason in a fixed order, for those who count by reason.
func Reasons() []Reason {
	all := make([]Reason, len(reasonWords))
	for i := range all {
		all[i] = Reason(i)
	}
	return all
}

// RuleRef names one rule of one policy: the policy as "namespace/name" and the
// rule's index in the policy's ingress or egress list. The zero value names
// none.
type RuleRef struct {
	Policy string
	Rule   int
}

// Side is the part of a decision that concerns one end: the source's egress or
// the destination's ingress.
type Side struct {
	// Judged is false where the end is no pod, or isn't this node's to judge.
	// The other fields are then zero but for Verdict, which is Allow.
	Judged   bool
	Isolated bool
	Verdict  Verdict
	// The words for it are looked up when they are asked for: a decision is to
	// read no more memory than it is drawn from.
	flags uint8     // see sideEgress
	row   uint32    // of the table, from 1 on: the one that admits the flow
	pod   *Endpoint // the end's, which has the table
}

// Bits of Side.flags.
const (
	sideEgress    = 1 << 0 // it is the source's side
	sideAuditOnly = 1 << 1 // a denial of it is WouldDeny
)

// AuditOnly says that a denial of this side is WouldDeny.
func (s *Side) AuditOnly() bool { return s.flags&sideAuditOnly != 0 }

// NewSide makes the side of an isolated end from what it says, for those who have
// no snapshot that says it.
func NewSide(v Verdict, policies []string, allowedBy RuleRef) Side {
	t := &Table{policies: policies}
	s := Side{Judged: true, Isolated: true, Verdict: v, pod: &Endpoint{Ingress: t}}
	if allowedBy != (RuleRef{}) {
		s.row, t.refs = 1, []RuleRef{allowedBy}
	}
	return s
}

// table is the one that isolates the end, nil where it isn't isolated.
func (s *Side) table() *Table {
	switch {
	case !s.Isolated:
		return nil
	case s.flags&sideEgress != 0:
		return s.pod.Egress
	}
	return s.pod.Ingress
}

// Policies are the isolating policies as "namespace/name", sorted. The slice
// belongs to the snapshot: don't change it.
func (s *Side) Policies() []string {
	if t := s.table(); t != nil {
		return t.policies
	}
	return nil
}

// AllowedBy is the first rule (by policy name, then rule index) that admits the
// flow; zero when none does or none is needed.
func (s *Side) AllowedBy() RuleRef {
	if s.row == 0 {
		return RuleRef{}
	}
	return s.table().refs[s.row-1]
}

// Decision is a verdict and the whole of why. Holding on to one holds on to
// parts of the snapshot that made it.
type Decision struct {
	Verdict Verdict
	Reason  Reason
	Cached  bool
	// Unknown says that an end is a pod of this node that nobody knows yet: the
	// verdict is the one for when it doesn't become known in time.
	Unknown bool
	// Src and Dst are the pods at either end, nil where the address is no
	// pod's.
	Src, Dst *Endpoint
	Egress   Side
	Ingress  Side
}
