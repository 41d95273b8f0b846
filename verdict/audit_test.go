package verdict

import (
	"net/netip"
	"testing"
)

func TestParseAudit(t *testing.T) {
	for _, a := range []Audit{AuditDefault, AuditNone, AuditDenied, AuditAll} {
		if got, ok := ParseAudit(a.String()); got != a || !ok {
			t.Errorf("%q reads as %v, %v", a.String(), got, ok)
		}
	}
	if got, ok := ParseAudit("All\n"); got != AuditDefault || ok {
		t.Errorf("a wrong word reads as %v, %v", got, ok)
	}
}

// TestTableBlock finds the block by which a rule admits an address.
func TestTableBlock(t *testing.T) {
	prefix := netip.MustParsePrefix
	table := NewTable([]Policy{{Name: "a/p", Rules: []Rule{
		{Index: 0, AnyPeer: true, AnyPort: true},
		{Index: 1, AnyPort: true, Blocks: []Block{
			{CIDR: prefix("10.0.0.0/8"), Except: []netip.Prefix{prefix("10.1.0.0/16")}}, {CIDR: prefix("10.1.2.0/24")}, {CIDR: prefix("fd00::/8")},
		}},
	}}}, nil, nil)
	for _, c := range []struct {
		rule     int
		ip, want string
	}{
		{1, "10.2.0.1", "10.0.0.0/8"}, {1, "10.1.2.3", "10.1.2.0/24"}, {1, "fd00::1", "fd00::/8"},
		{1, "10.1.3.1", ""}, {1, "192.0.2.1", ""}, {0, "10.2.0.1", ""}, {7, "10.2.0.1", ""},
	} {
		got := table.Block(RuleRef{"a/p", c.rule}, netip.MustParseAddr(c.ip))
		if got.IsValid() != (c.want != "") || got.IsValid() && got.String() != c.want {
			t.Errorf("rule %d, %s: %s, want %q", c.rule, c.ip, got, c.want)
		}
	}
}

// TestWorkerSnapshot: a worker tells by which snapshot it has decided, from the
// cache or not.
func TestWorkerSnapshot(t *testing.T) {
	e := NewEngine()
	w := e.NewWorker(8)
	f := Flow{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Proto: TCP, DstPort: 80}
	if w.Decide(&f); w.Snapshot() != nil {
		t.Error("a snapshot before the first one")
	}
	var s *Snapshot
	for i := range uint64(3) {
		s = NewSnapshot(Input{Generation: i + 1, Versions: map[string]string{"a/p": "7"}}, s)
		e.Swap(s)
		if d := w.Decide(&f); w.Snapshot() != s || d.Cached != (i > 0) {
			t.Errorf("generation %d: another snapshot, cached %v", i+1, d.Cached)
		}
	}
	if s.PolicyVersion("a/p") != "7" || s.PolicyVersion("a/q") != "" {
		t.Error("the policy's version isn't what was given")
	}
}
