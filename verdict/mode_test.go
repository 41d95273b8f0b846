package verdict

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

func TestParseMode(t *testing.T) {
	for _, m := range []Mode{ModeDefault, ModeEnforce, ModeAuditOnly} {
		if got, ok := ParseMode(m.String()); got != m || !ok {
			t.Errorf("%q reads as %v, %v", m.String(), got, ok)
		}
	}
	if got, ok := ParseMode("off"); got != ModeDefault || ok {
		t.Errorf("a wrong word reads as %v, %v", got, ok)
	}
	if ModeDefault.Or(ModeAuditOnly) != ModeAuditOnly || ModeEnforce.Or(ModeAuditOnly) != ModeEnforce {
		t.Error("Or")
	}
}

// TestOnlySomeVerdictsPass: whatever isn't known to pass doesn't.
func TestOnlySomeVerdictsPass(t *testing.T) {
	for v := range 256 {
		if passes := Verdict(v).Passes(); passes != (Verdict(v) == Allow || Verdict(v) == WouldDeny) {
			t.Errorf("verdict %d passes: %v", v, passes)
		}
	}
}

// TestAuditOnly has both ends isolated, without a rule, and each in either mode.
func TestAuditOnly(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	closed := NewTable([]Policy{{Name: "x/closed"}}, nil, nil)
	build := func(src, dst bool) *Snapshot {
		return NewSnapshot(Input{Generation: 1, AuditOnly: src && dst, Owners: map[netip.Addr]*Endpoint{
			a: {Name: "a", Judged: true, Egress: closed, AuditOnly: src}, b: {Name: "b", Judged: true, Ingress: closed, AuditOnly: dst},
		}}, nil)
	}
	whole, cut, unread := Flow{Src: a, Dst: b, Proto: TCP, DstPort: 80}, Flow{Src: a, Dst: b, Proto: TCP, Defect: ReasonTruncated}, Flow{Defect: ReasonMalformed}
	for _, c := range []struct {
		src, dst bool
		flow     Flow
		want     string
	}{
		{false, false, whole, "deny deny deny no-rule"},
		{true, false, whole, "deny would-deny deny no-rule"},
		{false, true, whole, "deny deny would-deny no-rule"},
		{true, true, whole, "would-deny would-deny would-deny no-rule"},
		{true, false, cut, "deny would-deny deny truncated"},
		{true, true, cut, "would-deny would-deny would-deny truncated"},
		{true, false, unread, "deny allow allow malformed"},
		{true, true, unread, "would-deny allow allow malformed"},
		{true, false, Flow{Src: b, Dst: a, Proto: TCP}, "allow allow allow not-isolated"},
	} {
		d := build(c.src, c.dst).Decide(&c.flow)
		got := d.Verdict.String() + " " + d.Egress.Verdict.String() + " " + d.Ingress.Verdict.String() + " " + d.Reason.String()
		if got != c.want {
			t.Errorf("audit-only %v to %v: %s, want %s", c.src, c.dst, got, c.want)
		}
	}
}

// TestAuditOnlyChangesDenialsAlone holds random decisions of two snapshots to each
// other that differ in the modes of their pods.
func TestAuditOnlyChangesDenialsAlone(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	addrs := make([]netip.Addr, 8)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
	}
	for range 300 {
		enforcing, mixed := map[netip.Addr]*Endpoint{}, map[netip.Addr]*Endpoint{}
		for _, a := range addrs[:6] {
			pod := Endpoint{Name: a.String(), Judged: r.IntN(4) > 0}
			if r.IntN(2) == 0 {
				pod.Ingress = NewTable([]Policy{{Name: "x/in", Rules: []Rule{{AnyPort: true, Blocks: []Block{{CIDR: netip.PrefixFrom(addrs[r.IntN(8)], 31).Masked()}}}}}}, nil, nil)
			}
			if r.IntN(2) == 0 {
				pod.Egress = NewTable([]Policy{{Name: "x/out", Rules: []Rule{{AnyPeer: true, Ports: []PortRange{{TCP, 1, 2}}}}}}, nil, nil)
			}
			other := pod
			other.AuditOnly = r.IntN(2) == 0
			enforcing[a], mixed[a] = &pod, &other
		}
		s, m := NewSnapshot(Input{Generation: 1, Owners: enforcing}, nil), NewSnapshot(Input{Generation: 1, Owners: mixed}, nil)
		for range 50 {
			f := Flow{Src: addrs[r.IntN(8)], Dst: addrs[r.IntN(8)], Proto: TCP, DstPort: uint16(r.IntN(4))}
			if r.IntN(5) == 0 {
				f.Defect = ReasonFragment
			}
			want, got := s.Decide(&f), m.Decide(&f)
			// The slow judge: a side that denies does so as its pod's mode has it, and
			// the verdict is the worst of both.
			for _, side := range []struct {
				side *Side
				pod  *Endpoint
			}{{&want.Egress, mixed[f.Src]}, {&want.Ingress, mixed[f.Dst]}} {
				if side.side.Verdict == Deny && side.pod.AuditOnly {
					side.side.Verdict = WouldDeny
				}
			}
			if want.Verdict == Deny && want.Egress.Verdict != Deny && want.Ingress.Verdict != Deny {
				want.Verdict = WouldDeny
			}
			if got.Verdict != want.Verdict || got.Reason != want.Reason || got.Egress.Verdict != want.Egress.Verdict || got.Ingress.Verdict != want.Ingress.Verdict {
				t.Fatalf("%+v: %+v, want %+v", f, got, want)
			}
		}
	}
}
