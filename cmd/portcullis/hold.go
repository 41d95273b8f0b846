package main

import (
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"portcullis/filter"
	"portcullis/policycache"
	"portcullis/verdict"
)

// maxHeld bounds --hold-packets.
const maxHeld = 1 << 16

// holdFlags say what is done with packets of pods that nobody knows yet.
type holdFlags struct {
	hold    time.Duration
	packets int
	unknown string
	cidrs   []string
}

func (h *holdFlags) register(f *pflag.FlagSet) {
	f.DurationVar(&h.hold, "hold", time.Second, "how long packets of an address in the node's pod ranges that is no known pod's wait until it is; 0 takes such an address for any other")
	f.IntVar(&h.packets, "hold-packets", filter.DefaultHoldMax, "how many such packets each queue holds, at most half of --queue-length; an eighth of them of one address")
	f.StringVar(&h.unknown, "unknown-pod", "deny", "what becomes of packets whose pod didn't become known in time: allow, or deny where there is any policy")
	f.StringArrayVar(&h.cidrs, "pod-cidr", nil, "a range of this node's pods, besides those that its Node names (spec.podCIDRs); may be given several times")
}

// check finds what is wrong with the flags.
func (h *holdFlags) check() error {
	switch {
	case h.hold < 0 || h.hold > time.Minute:
		return fmt.Errorf("--hold %s is not within 0 and 1m", h.hold)
	case h.packets < 1 || h.packets > maxHeld:
		return fmt.Errorf("--hold-packets %d is not within 1 and %d", h.packets, maxHeld)
	case h.unknown != verdict.Allow.String() && h.unknown != verdict.Deny.String():
		return fmt.Errorf("--unknown-pod %q: want allow or deny", h.unknown)
	}
	_, err := h.prefixes()
	return err
}

// prefixes reads the ranges.
func (h *holdFlags) prefixes() (list []netip.Prefix, err error) {
	for _, text := range h.cidrs {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil || p.Addr().Is4In6():
			return nil, fmt.Errorf("--pod-cidr %q is not a range such as 10.244.1.0/24", text)
		case p.Bits() == 0 || p.IsSingleIP():
			return nil, fmt.Errorf("--pod-cidr %s: it is all addresses or a single one, and no node's range", text)
		}
		list = append(list, p.Masked())
	}
	return list, nil
}

// policy gives what the compiler is told of unknown pods. The flags are checked.
func (h *holdFlags) policy() policycache.Unknown {
	u := policycache.Unknown{Guard: h.hold > 0}
	u.CIDRs, _ = h.prefixes()
	if h.unknown == verdict.Allow.String() {
		u.Verdict = verdict.Allow
	}
	return u
}

var (
	heldNow   = gauge("held_packets", "Packets of unknown pods that wait until their pods are known.")
	heldTotal = counter("held_packets_total", "Packets of unknown pods that were held.")
	heldEnded = counter("held_packets_ended_total", "Held packets that were given their verdict, by when: their pod became known, or their time was up (expired); or that went back to the kernel when the agent ended (returned).", "end", "verdict")
	forgotten = counter("forgotten_connections_total", "Connections that the kernel was made to forget since the pod at an end has gone, or another has its address.")
	heldFull  = counter("held_packets_refused_total", "Packets of unknown pods that weren't held for want of room, and were treated at once as after their time.")
)

// collectHeld shows what the queues hold.
func collectHeld(ch chan<- prometheus.Metric, queues []filter.QueueStats) {
	var sum filter.HoldStats
	for _, q := range queues {
		sum.Now += q.Hold.Now
		sum.Total += q.Hold.Total
		sum.Full += q.Hold.Full
		sum.Returned += q.Hold.Returned
		for v := range sum.Known {
			sum.Known[v] += q.Hold.Known[v]
			sum.Expired[v] += q.Hold.Expired[v]
		}
	}
	heldNow.emit(ch, float64(sum.Now))
	heldTotal.emit(ch, float64(sum.Total))
	heldFull.emit(ch, float64(sum.Full))
	for _, v := range []verdict.Verdict{verdict.Deny, verdict.Allow} {
		heldEnded.emit(ch, float64(sum.Known[v]), "known", v.String())
		heldEnded.emit(ch, float64(sum.Expired[v]), "expired", v.String())
	}
	heldEnded.emit(ch, float64(sum.Returned), "returned", "")
}

// describeHeld writes which addresses are looked out for.
func describeHeld(w io.Writer, s *verdict.Snapshot) {
	if ranges := s.PodRanges().Prefixes(); len(ranges) > 0 {
		fmt.Fprintf(w, "[i] pod ranges: %v, %d addresses in them known\n", ranges, len(s.KnownAddrs()))
	} else {
		fmt.Fprintf(w, "[i] pod ranges: none to look out for\n")
	}
}
