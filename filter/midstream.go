package filter

import "portcullis/verdict"

// firstEphemeral is the first of the ports that Linux, and IANA's advice later,
// leaves to the clients' ends of connections (net.ipv4.ip_local_port_range).
const firstEphemeral = 32768

const (
	tcpSYN   = 0x02
	tcpACK   = 0x10
	sctpInit = 1 // the type of an association's first chunk
)

// Midstream tells whether the packet last decoded is one of TCP or SCTP that opens no
// connection. Conntrack takes one that it knows nothing of for NEW all the same
// (nf_conntrack_tcp_loose), as after its table has been flushed.
func (d *Decoder) Midstream() bool {
	f := d.walk.flow
	switch {
	case f == nil || f.Defect != verdict.ReasonNone:
		return false
	case f.Proto == verdict.TCP:
		return d.walk.tcpFlags&(tcpSYN|tcpACK) != tcpSYN
	case f.Proto == verdict.SCTP:
		chunks := d.sctp.LayerPayload()
		return len(chunks) == 0 || chunks[0] != sctpInit
	}
	return false
}

// decide judges the packet at hand. One from the middle of a connection may have to
// be judged as the other end's connection, which w.flow is then.
func (w *worker) decide() *verdict.Decision {
	d := w.judge.Decide(&w.flow)
	if !w.midstream {
		return d
	}
	if s := w.judge.Snapshot(); turnedDown(s, &w.flow, d, &w.turned) {
		return &w.turned
	}
	return d
}

// turnedDown tells whether a connection that was met in its middle, and that policy
// allows in the orientation in which it was met, must be denied all the same,
// because it may be one that the other end has opened, and policy denies that. If
// so, f is turned to the other orientation and d is the decision about it.
//
// Nothing in a segment from the middle tells who has opened the connection, so
// there are two ways to be wrong:
//
//   - Its sender hasn't opened it, and isn't allowed to. If its segment were let
//     in, conntrack would take the connection for the sender's and established, and
//     a SYN that followed would pass. So the sender's orientation must be allowed,
//     always: who begins with an ACK gets no further than with a SYN.
//   - Its sender has been called by the other end, which is no longer allowed to.
//     If its answer were let in, a denied connection would go on. So the other
//     orientation must be allowed too.
//
// Where policy allows just the sender's, as it does for a server that is isolated
// both ways and whose clients aren't, one thing more is believed: that the sender
// is the client whose port is one for clients where the other's is none. It would
// be wrong about a client that has bound a low port, of a server on a high one which
// is allowed, for its part, to connect to that client's port.
func turnedDown(s *verdict.Snapshot, f *verdict.Flow, met, d *verdict.Decision) bool {
	if s == nil || met.Verdict != verdict.Allow || f.SrcPort >= firstEphemeral && f.DstPort < firstEphemeral {
		return false
	}
	other := *f
	other.Src, other.Dst, other.SrcPort, other.DstPort = f.Dst, f.Src, f.DstPort, f.SrcPort
	if *d = s.Decide(&other); d.Verdict == verdict.Allow {
		return false
	}
	*f = other
	return true
}
