package filter

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"portcullis/verdict"
)

// garbageEngine isolates both ends of the samples in both directions, and admits
// nothing.
func garbageEngine() *verdict.Engine {
	shut := verdict.NewTable([]verdict.Policy{{Name: "a/shut"}}, nil, nil)
	owners := map[netip.Addr]*verdict.Endpoint{}
	for i, ips := range [][]string{{"10.0.0.1", "fd00::1"}, {"10.0.0.2", "fd00::2"}} {
		end := &verdict.Endpoint{Namespace: "a", Name: string(rune('a' + i)), Judged: true, Meaning: uint64(i + 1), Ingress: shut, Egress: shut}
		for _, ip := range ips {
			owners[netip.MustParseAddr(ip)] = end
		}
	}
	e := verdict.NewEngine()
	e.Swap(verdict.NewSnapshot(verdict.Input{Generation: 1, Owners: owners}, nil))
	return e
}

// garbageLength is what lengths in headers are set to.
var garbageLength = []int{0, 1, 4, 7, 8, 19, 20, 21, 39, 40, 41, 60, 127, 128, 255, 256, 1279, 1500, 0x7fff, 0x8000, 0xfffe, 0xffff}

// garbageOf gives everything that can be made of a sample without touching its
// addresses: each truncation, each byte of the headers with each value, each length
// in each place where one might be, and random damage.
func garbageOf(version uint16, b []byte, r *rand.Rand, try func(b []byte, wire int)) {
	from, to := 12, 20
	if version == 6 {
		from, to = 8, 40
	}
	for n := range b {
		try(b[:n], n)
		try(b[:n], len(b))
		try(b[:n], 1<<20)
		if n >= from && n < to {
			continue
		}
		for v := range 256 {
			c := slices.Clone(b)
			c[n] = byte(v)
			try(c, len(c))
		}
		for _, v := range garbageLength {
			if n+2 > len(b) || n+2 > from && n < to {
				continue
			}
			c := slices.Clone(b)
			binary.BigEndian.PutUint16(c[n:], uint16(v))
			try(c, len(c))
			try(c[:r.IntN(len(c))], r.IntN(1<<17))
		}
	}
}

// TestGarbageIsDenied: whatever becomes of a packet's bytes, as long as its addresses
// are those of an isolated pod it is denied, for a reason that has a name. Nothing
// but neighbour discovery that no router has forwarded gets through.
func TestGarbageIsDenied(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	d, judge := NewDecoder(), garbageEngine().NewWorker(64)
	reasons := map[verdict.Reason]int{}
	for name, sample := range decSamples() {
		version := uint16(name[0] - '0')
		garbageOf(version, sample, r, func(b []byte, wire int) {
			var f verdict.Flow
			d.Decode(version, b, uint32(wire), &f)
			got := judge.Decide(&f)
			reasons[got.Reason]++
			discovery := got.Reason == verdict.ReasonNeighbour && version == 6 && b[7] == 255
			if got.Verdict == verdict.Allow && !discovery || got.Reason == verdict.ReasonNone {
				t.Fatalf("%s: %s (%s) for % x, %d on the wire", name, got.Verdict, got.Reason, b, wire)
			}
		})
	}
	for _, reason := range []verdict.Reason{verdict.ReasonMalformed, verdict.ReasonTruncated, verdict.ReasonFragment, verdict.ReasonNoRule} {
		if reasons[reason] < 20 {
			t.Errorf("only %d of %v were %s", reasons[reason], reasons, reason)
		}
	}
}

// TestEveryProtocolIsDenied: all 256, behind each kind of extension header too, whole
// and with nothing behind the header.
func TestEveryProtocolIsDenied(t *testing.T) {
	d, judge := NewDecoder(), garbageEngine().NewWorker(64)
	for n := range 256 {
		proto := verdict.Protocol(n)
		for _, body := range [][]byte{nil, make([]byte, 4), make([]byte, 64)} {
			packets := map[uint16][][]byte{4: {decPacket(dec4(proto), decRaw(body...))}, 6: {decPacket(dec6(proto), decRaw(body...))}}
			for _, kind := range []verdict.Protocol{extHopByHop, extRouting, extFragment, extDestination, extAuth} {
				packets[6] = append(packets[6], decPacket(dec6(kind), decExt(proto), decRaw(body...)))
			}
			for version, all := range packets {
				for _, b := range all {
					var f verdict.Flow
					d.Decode(version, b, uint32(len(b)), &f)
					if got := judge.Decide(&f); got.Verdict != verdict.Deny {
						t.Errorf("protocol %d in IPv%d: %s (%s), % x", n, version, got.Verdict, got.Reason, b)
					}
				}
			}
		}
	}
}
