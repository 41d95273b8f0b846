package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"
)

// ctTable is a table of all sorts (conntrack's command makes its TCP entries look like
// such as were met in their middle): DNAT, SNAT, both families, protocols with and
// without ports, a zone, a mark.
const ctTable = `
	conntrack -I -p udp -s 10.0.0.1 -d 10.0.0.2 --sport 1000 --dport 53 -t 100 -m 0x1000
	conntrack -I -p tcp -s 10.0.0.1 -d 10.96.0.1 --sport 1001 --dport 80 -r 10.0.0.3 -q 10.0.0.1 --reply-port-src 8080 --reply-port-dst 1001 --state ESTABLISHED -t 100
	conntrack -I -p tcp -s 10.0.0.1 -d 8.8.8.8 --sport 1002 --dport 443 -r 8.8.8.8 -q 192.168.0.1 --reply-port-src 443 --reply-port-dst 5 --state ESTABLISHED -t 100
	conntrack -I -p udp -s fd00::1 -d fd00::2 --sport 1003 --dport 53 -t 100 -m 0xf2000
	conntrack -I -p icmp -s 10.0.0.1 -d 10.0.0.2 --icmp-type 8 --icmp-code 0 --icmp-id 7 -t 100
	conntrack -I -p icmpv6 -s fd00::1 -d fd00::2 --icmpv6-type 128 --icmpv6-code 0 --icmpv6-id 7 -t 100
	conntrack -I -p 99 -s 10.0.0.2 -d 10.0.0.1 -t 100
	conntrack -I -p sctp -s 10.0.0.2 -d 10.0.0.1 --sport 7 --dport 8 --state ESTABLISHED --orig-vtag 1 --reply-vtag 2 -t 100
	conntrack -I -p udp -s 10.0.0.3 -d 10.0.0.2 --sport 1004 --dport 53 -t 100 -w 7`

// ctWords writes what an entry says.
func ctWords(e *ctEntry) string {
	f := e.flow()
	text := fmt.Sprintf("%s %s>%s", f.Proto, netip.AddrPortFrom(f.Src, f.SrcPort), netip.AddrPortFrom(f.Dst, f.DstPort))
	if f.ICMPType != 0 {
		text += fmt.Sprintf(" type %d", f.ICMPType)
	}
	if e.mark != 0 {
		text += fmt.Sprintf(" mark %#x", e.mark)
	}
	if e.midstream {
		text += " midstream"
	}
	return text
}

// ctDump lists the table by its words, sorted.
func ctDump(t *testing.T, pick ctPick) []string {
	t.Helper()
	s, err := openCT()
	kernelOK(t, err)
	defer s.close()
	var all []string
	kernelOK(t, s.dump(pick, func(e *ctEntry) error {
		all = append(all, ctWords(e))
		return nil
	}))
	slices.Sort(all)
	return all
}

// TestConntrackIsRead reads entries as the queue would have seen their first
// packets, whole and by the kernel's pick.
func TestConntrackIsRead(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, ctTable)
	dns, web := "UDP 10.0.0.1:1000>10.0.0.2:53 mark 0x1000", "TCP 10.0.0.1:1001>10.0.0.3:8080 midstream"
	out, v6 := "TCP 10.0.0.1:1002>8.8.8.8:443 midstream", "UDP [fd00::1]:1003>[fd00::2]:53 mark 0xf2000"
	ping, ping6 := "ICMP 10.0.0.1:0>10.0.0.2:0 type 8", "ICMPv6 [fd00::1]:0>[fd00::2]:0 type 128"
	odd, sctp, zone := "99 10.0.0.2:0>10.0.0.1:0", "SCTP 10.0.0.2:7>10.0.0.1:8", "UDP 10.0.0.3:1004>10.0.0.2:53"
	for _, c := range []struct {
		family byte
		addr   string
		reply  bool
		want   []string
	}{
		{unix.AF_UNSPEC, "", false, []string{dns, web, out, v6, ping, ping6, odd, sctp, zone}},
		{unix.AF_INET, "", false, []string{dns, web, out, ping, odd, sctp, zone}},
		{unix.AF_INET6, "", false, []string{v6, ping6}},
		{unix.AF_INET, "10.0.0.1", false, []string{dns, web, out, ping}},
		{unix.AF_INET, "10.0.0.1", true, []string{odd, sctp}},
		{unix.AF_INET, "10.0.0.3", true, []string{web}},
		{unix.AF_INET, "10.0.0.3", false, []string{zone}},
		{unix.AF_INET, "10.96.0.1", true, nil},
	} {
		a, _ := netip.ParseAddr(c.addr)
		slices.Sort(c.want)
		if got := ctDump(t, ctPick{c.family, a, c.reply}); !slices.Equal(got, c.want) {
			t.Errorf("%d %s, reply %v:\n got %q\nwant %q", c.family, c.addr, c.reply, got, c.want)
		}
	}
}

// TestMarksAreMasked changes some bits of marks, many connections at once, and
// passes over those that are gone.
func TestMarksAreMasked(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, ctTable)
	s, err := openCT()
	kernelOK(t, err)
	defer s.close()
	var edits []markEdit
	kernelOK(t, s.dump(ctPick{}, func(e *ctEntry) error {
		edits = append(edits, markEdit{e.family, slices.Clone(e.tuple), slices.Clone(e.zone), 0x2000, 0x3000})
		return nil
	}))
	kernelRun(t, "conntrack -D -p 99")
	made := 0
	kernelOK(t, s.mark(edits, func(_ int, err error) {
		if err == nil {
			made++
		} else if !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	}))
	if made != len(edits)-1 {
		t.Errorf("%d of %d changes were made", made, len(edits)-1)
	}
	for _, words := range ctDump(t, ctPick{}) {
		want := " mark 0x2000"
		if strings.HasPrefix(words, "UDP [") {
			want = " mark 0xf2000"
		}
		if !strings.Contains(words+" ", want+" ") {
			t.Errorf("%q, want %s", words, want)
		}
	}
}

// TestConntrackRefuses: of several changes each has an end of its own.
func TestConntrackRefuses(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, "conntrack -I -p udp -s 10.0.0.1 -d 10.0.0.2 --sport 1000 --dport 53 -t 100")
	s, err := openCT()
	kernelOK(t, err)
	defer s.close()
	var edit markEdit
	kernelOK(t, s.dump(ctPick{}, func(e *ctEntry) error {
		edit = markEdit{e.family, slices.Clone(e.tuple), nil, 0x2000, 0x3000}
		return nil
	}))
	wrong := edit
	wrong.tuple = nil
	var ends []string
	kernelOK(t, s.mark([]markEdit{wrong, edit}, func(i int, err error) { ends = append(ends, fmt.Sprint(i, " ", err)) }))
	if want := []string{"0 invalid argument", "1 <nil>"}; !slices.Equal(ends, want) {
		t.Errorf("%q", ends)
	}
}

// fillConntrack puts n connections between addresses of 10.9.0.0/16 into the table.
func fillConntrack(t *testing.T, n int) {
	t.Helper()
	c, err := conntrack.Dial(nil)
	kernelOK(t, err)
	defer c.Close()
	for i := range n {
		src := netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)})
		dst := netip.AddrFrom4([4]byte{10, 9, 255, byte(i >> 16)})
		kernelOK(t, c.Create(conntrack.NewFlow(17, 0, src, dst, uint16(1024+i/1000), 53, 600, 0)))
	}
}

// TestHundredThousandEntries judges all of a table of 100,000 connections, and those
// of one address of it, within the second that is promised (in processor time, for
// the machine may have other things to do), and says how long that took beside a
// library that reads the table as a whole.
func TestHundredThousandEntries(t *testing.T) {
	kernelNetns(t)
	const entries = 100_000
	fillConntrack(t, entries)
	r := newRevokeRig(t, RevokeConfig{})
	r.engine.Swap(revokeSnapshot(nil))
	look := func(due func()) (text string, judged uint64) {
		before, cpu, start := r.Stats().Judged, threadTime(t), time.Now()
		due()
		r.look()
		used := threadTime(t) - cpu
		kernelOK(t, r.Unready())
		if used > time.Second {
			t.Errorf("a look used %v of a processor", used)
		}
		return fmt.Sprintf("%v (%v of a processor)", time.Since(start), used), r.Stats().Judged - before
	}
	whole, judged := look(r.Everything)
	if judged != entries {
		t.Errorf("%d of %d connections were judged", judged, entries)
	}
	r.allDue = 0
	few, judged := look(func() { r.Changed(kernelAddrs("10.9.0.1")) })
	if judged == 0 || judged > 100 {
		t.Errorf("%d connections of an address were judged", judged)
	}
	// Two thirds of them are denied at once, but for what the pod says to itself.
	s := revokeSnapshot(r.engine.Snapshot(), revokePod{"10.9.255.0", "-", ""})
	r.engine.Swap(s)
	revoked, _ := look(func() { r.Changed(s.Changed()) })
	if n := r.Stats().Revoked; n != 1<<16-1 {
		t.Errorf("%d connections were revoked", n)
	}
	c, err := conntrack.Dial(nil)
	kernelOK(t, err)
	defer c.Close()
	start := time.Now()
	_, err = c.Dump(nil)
	kernelOK(t, err)
	t.Logf("of %d connections all are judged in %s, an address's in %s, and %d revoked in %s; the library's dump alone takes %v",
		entries, whole, few, 1<<16-1, revoked, time.Since(start))
}

// threadTime is how long the thread has used a processor.
func threadTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	kernelOK(t, unix.Getrusage(unix.RUSAGE_THREAD, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// FuzzParseEntry: no message makes the parser panic or loop, and what it accepts
// has its addresses.
func FuzzParseEntry(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0})
	tuple := appendAttr(nil, ctaIP, appendAttr(appendAttr(nil, ctaIPv4Src, []byte{10, 0, 0, 1}), ctaIPv4Dst, []byte{10, 0, 0, 2}))
	tuple = appendAttr(tuple, ctaProto, appendAttr(appendAttr(nil, ctaProtoNum, []byte{6}), ctaSrcPort, []byte{4, 0}))
	info := appendAttr(nil, ctaInfoTCP, appendAttr(nil, ctaInfoTCPFlags, []byte{tcpLiberal, 0}))
	b := appendAttr([]byte{2, 0, 0, 0}, ctaTupleOrig, tuple)
	b = appendAttr(appendAttr(b, ctaTupleReply, tuple), ctaMark, []byte{0, 0, 0x10, 0})
	f.Add(appendAttr(appendAttr(b, ctaProtoInfo, info), ctaTupleMaster, tuple))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e ctEntry
		if parseEntry(b, &e) != nil {
			return
		}
		if fl := e.flow(); !fl.Src.IsValid() || !fl.Dst.IsValid() || fl.Src.Is4In6() {
			t.Errorf("accepted: %+v", fl)
		}
	})
}
