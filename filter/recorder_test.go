package filter

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ti-mo/conntrack"

	"portcullis/verdict"
)

// recorderEngine knows a/open, which nothing isolates, a/db, which is isolated in
// ingress and open for nobody, c/far of another node, and a node.
func recorderEngine() *verdict.Engine {
	ip := netip.MustParseAddr
	open := &verdict.Endpoint{Namespace: "a", Name: "open", Judged: true}
	db := &verdict.Endpoint{Namespace: "a", Name: "db", Node: "n1", Judged: true, Ingress: verdict.NewTable([]verdict.Policy{{Name: "a/p"}}, nil, nil)}
	e := verdict.NewEngine()
	e.Swap(verdict.NewSnapshot(verdict.Input{Generation: 1,
		Owners: map[netip.Addr]*verdict.Endpoint{ip("127.0.0.2"): db, ip("127.0.0.3"): open, ip("fd00::2"): open, ip("127.0.0.4"): {Namespace: "c", Name: "far"}},
		Nodes:  map[netip.Addr][]string{ip("127.0.0.9"): {"n1"}}}, nil))
	return e
}

// recorderSend sends a datagram.
func recorderSend(t *testing.T, from, to string) {
	t.Helper()
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from))}
	c, err := d.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
}

// recorderUntil waits for a state of the counts.
func recorderUntil(t *testing.T, r *Recorder, done func(RecorderStats) bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !done(r.Stats()); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %+v", r.Stats())
		}
	}
}

// TestRecorder makes one connection of each sort and looks who is in the log.
func TestRecorder(t *testing.T) {
	queueNetns(t)
	queueRun(t, `
		iptables -t mangle -A OUTPUT -m conntrack --ctstate INVALID -j ACCEPT
		ip6tables -t mangle -A OUTPUT -m conntrack --ctstate INVALID -j ACCEPT
		iptables -t nat -A OUTPUT -p udp -d 127.0.0.100 --dport 53 -j DNAT --to-destination 127.0.0.3:9000
		iptables -t mangle -A OUTPUT -p udp --sport 4007 -j CONNMARK --set-mark 0x1000/0x1000`)
	var lines bytes.Buffer
	log := queueLog(&lines, 64)
	r, err := OpenRecorder(RecorderConfig{AcceptMark: 0x1000, SysctlDir: SysctlDir}, recorderEngine(), log, queueQuiet)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{
		{"127.0.0.1:4001", "127.0.0.3:9000"}, // external to open
		{"127.0.0.3:4002", "127.0.0.4:9000"}, // open to another node's
		{"127.0.0.1:4003", "127.0.0.100:53"}, // behind a Service
		{"[fd00::1]:4004", "[fd00::2]:9000"}, // IPv6
		{"127.0.0.1:4005", "127.0.0.5:9000"}, // nobody's
		{"127.0.0.1:4006", "127.0.0.2:9000"}, // past the queue
		{"127.0.0.1:4007", "127.0.0.2:9000"}, // queued and accepted
		{"127.0.0.9:4008", "127.0.0.2:9000"}, // the node to its pod
		{"127.0.0.4:4009", "127.0.0.5:9000"}, // another node's to nobody's
		{"127.0.0.2:4010", "127.0.0.5:9000"}, // isolated the other way
		{"127.0.0.3:4011", "127.0.0.3:9000"}, // to itself
	} {
		recorderSend(t, c[0], c[1])
	}
	recorderUntil(t, r, func(s RecorderStats) bool {
		// A new namespace may lose its first IPv6 packet; repeated, it is one
		// connection all the same.
		recorderSend(t, "[fd00::1]:4004", "[fd00::2]:9000")
		return s.Recorded >= 6 && s.Unjudged >= 1
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if s := r.Stats(); s != (RecorderStats{Recorded: 6, Unjudged: 1}) {
		t.Errorf("%+v", s)
	}
	type end struct {
		IP   string
		Port uint16
		Pod  string
	}
	var got []string
	for line := range strings.Lines(lines.String()) {
		var l struct {
			Verdict, Reason string
			Directions      []string
			Src, Dst        end
			Observed        bool
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		got = append(got, fmt.Sprint(l.Verdict, " ", l.Reason, " ", l.Directions, " ", l.Src, " ", l.Dst, " ", l.Observed))
	}
	want := `allow not-isolated [egress] {127.0.0.2 4010 db} {127.0.0.5 9000 } true
allow not-isolated [egress] {127.0.0.3 4002 open} {127.0.0.4 9000 far} true
allow not-isolated [ingress] {127.0.0.1 4001 } {127.0.0.3 9000 open} true
allow not-isolated [ingress] {127.0.0.1 4003 } {127.0.0.3 9000 open} true
allow not-isolated [ingress] {fd00::1 4004 } {fd00::2 9000 open} true
allow self [egress ingress] {127.0.0.3 4011 open} {127.0.0.3 9000 open} true`
	slices.Sort(got)
	if text := strings.Join(got, "\n"); text != want {
		t.Errorf("got\n%s\nwant\n%s", text, want)
	}
}

// TestRecorderCountsWhatItMisses has a socket with next to no buffer, and many
// connections at once: each one is recorded or counted, and the log says so.
func TestRecorderCountsWhatItMisses(t *testing.T) {
	queueNetns(t)
	queueRun(t, `iptables -t mangle -A OUTPUT -m conntrack --ctstate INVALID -j ACCEPT`)
	var lines bytes.Buffer
	log := queueLog(&lines, 16384)
	r, err := OpenRecorder(RecorderConfig{SysctlDir: SysctlDir, ReadBuffer: 4096}, recorderEngine(), log, queueQuiet)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:4000")))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := uint64(0)
	for r.Stats().Unseen == 0 && sent < 50000 {
		for range 1000 {
			sent++
			// Another port is another connection.
			if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), uint16(sent))); err != nil && !strings.Contains(err.Error(), "refused") {
				t.Fatal(err)
			}
		}
	}
	// The kernel tells of drops when something is read, so there has to be something.
	recorderUntil(t, r, func(s RecorderStats) bool {
		if s.Recorded+s.Unseen >= sent {
			return true
		}
		sent++
		c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), uint16(sent)))
		return false
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	log.Close()
	s := r.Stats()
	t.Logf("%d connections: %+v", sent, s)
	if s.Unseen == 0 || s.Recorded+s.Unseen != sent {
		t.Errorf("%d connections: %+v", sent, s)
	}
	told := uint64(0)
	for line := range strings.Lines(lines.String()) {
		var l struct{ Unseen uint64 }
		if json.Unmarshal([]byte(line), &l) == nil {
			told += l.Unseen
		}
	}
	if told != s.Unseen {
		t.Errorf("the log tells of %d, %d weren't seen", told, s.Unseen)
	}
}

// TestCheckEvents switches on what is off, and says what to do if it can't.
func TestCheckEvents(t *testing.T) {
	dir := t.TempDir()
	if err := CheckEvents(dir); err == nil || !strings.Contains(err.Error(), "CONFIG_NF_CONNTRACK_EVENTS") {
		t.Errorf("no such kernel: %v", err)
	}
	path := filepath.Join(dir, "net/netfilter/nf_conntrack_events")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{"0\n", "1"}, {"1\n", "1\n"}, {"2\n", "2\n"}} {
		if err := os.WriteFile(path, []byte(c[0]), 0o644); err != nil {
			t.Fatal(err)
		}
		err := CheckEvents(dir)
		if got, _ := os.ReadFile(path); err != nil || string(got) != c[1] {
			t.Errorf("%q: %v, left at %q", c[0], err, got)
		}
	}
}

// TestFlowOf: the destination is the one after DNAT, the source the one before
// SNAT.
func TestFlowOf(t *testing.T) {
	ip := netip.MustParseAddr
	tuple := func(src, dst string, proto uint8, from, to uint16) conntrack.Tuple {
		return conntrack.Tuple{IP: conntrack.IPTuple{SourceAddress: ip(src), DestinationAddress: ip(dst)},
			Proto: conntrack.ProtoTuple{Protocol: proto, SourcePort: from, DestinationPort: to, ICMPType: 8}}
	}
	for _, c := range []struct {
		there, back conntrack.Tuple
		want        verdict.Flow
	}{
		{tuple("10.0.0.1", "10.96.0.1", 6, 4000, 443), tuple("10.0.0.2", "192.0.2.1", 6, 6443, 61000),
			verdict.Flow{Src: ip("10.0.0.1"), Dst: ip("10.0.0.2"), Proto: 6, SrcPort: 4000, DstPort: 6443}},
		{tuple("10.0.0.1", "10.0.0.2", 1, 0, 0), tuple("10.0.0.2", "10.0.0.1", 1, 0, 0), verdict.Flow{Src: ip("10.0.0.1"), Dst: ip("10.0.0.2"), Proto: 1, ICMPType: 8}},
		{tuple("10.0.0.1", "10.0.0.2", 47, 7, 7), tuple("10.0.0.2", "10.0.0.1", 47, 7, 7), verdict.Flow{Src: ip("10.0.0.1"), Dst: ip("10.0.0.2"), Proto: 47}},
	} {
		if got := flowOf(&conntrack.Flow{TupleOrig: c.there, TupleReply: c.back}); got != c.want {
			t.Errorf("%+v, want %+v", got, c.want)
		}
	}
}
