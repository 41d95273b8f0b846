package filter

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"io"
	"maps"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/verdict"
)

// revokePod is a pod of this node with one address. A direction is open if it is
// empty, and else isolated by a policy that admits just the peers named in it, by
// address or by "address:port"; "-" admits nobody.
type revokePod struct{ addr, ingress, egress string }

var revokeSeed = maphash.MakeSeed()

// revokeSnapshot makes the snapshot that follows prev.
func revokeSnapshot(prev *verdict.Snapshot, pods ...revokePod) *verdict.Snapshot {
	in := verdict.Input{Generation: 1, Owners: map[netip.Addr]*verdict.Endpoint{}}
	if prev != nil {
		in.Generation = prev.Generation() + 1
	}
	for _, p := range pods {
		a := netip.MustParseAddr(p.addr)
		in.Owners[a] = &verdict.Endpoint{Namespace: "a", Name: p.addr, Judged: true, Addrs: []netip.Addr{a},
			Ingress: revokeTable("a/in", p.ingress), Egress: revokeTable("a/out", p.egress), Meaning: maphash.String(revokeSeed, fmt.Sprint(p))}
	}
	return verdict.NewSnapshot(in, prev)
}

func revokeTable(name, peers string) *verdict.Table {
	if peers == "" {
		return nil
	}
	var rules []verdict.Rule
	for i, peer := range strings.Fields(strings.Trim(peers, "-")) {
		r := verdict.Rule{Index: i, AnyPort: true}
		a, err := netip.ParseAddr(peer)
		if err != nil {
			ap := netip.MustParseAddrPort(peer)
			a, r.AnyPort = ap.Addr(), false
			r.Ports = []verdict.PortRange{{Proto: verdict.TCP, First: ap.Port(), Last: ap.Port()}}
		}
		r.Blocks = []verdict.Block{{CIDR: netip.PrefixFrom(a, a.BitLen())}}
		rules = append(rules, r)
	}
	return verdict.NewTable([]verdict.Policy{{Name: name, Rules: rules}}, nil, nil)
}

// revokeRig is a revoker whose looks the test makes itself.
type revokeRig struct {
	*testing.T
	*Revoker
	engine *verdict.Engine
}

func newRevokeRig(t *testing.T, cfg RevokeConfig) *revokeRig {
	cfg.Engine = verdict.NewEngine()
	if cfg.Log == nil {
		cfg.Log = kernelQuiet()
	}
	return &revokeRig{t, NewRevoker(cfg), cfg.Engine}
}

// change puts a policy in force and looks at what it concerns.
func (r *revokeRig) change(pods ...revokePod) {
	r.Helper()
	s := revokeSnapshot(r.engine.Snapshot(), pods...)
	r.engine.Swap(s)
	r.Changed(s.Changed())
	r.look()
	kernelOK(r.T, r.trouble)
}

// marks gives the marks that aren't zero by the connection's original source port.
func (r *revokeRig) marks() string {
	r.Helper()
	found := map[string]string{}
	for line := range strings.Lines(kernelRun(r.T, "(conntrack -L -f ipv4; conntrack -L -f ipv6) 2>/dev/null")) {
		m := regexp.MustCompile(`sport=(\d+).* mark=([1-9]\d*)`).FindStringSubmatch(line)
		if m != nil {
			found[m[1]] = m[2]
		}
	}
	var words []string
	for _, port := range slices.Sorted(maps.Keys(found)) {
		var n int
		fmt.Sscan(found[port], &n)
		words = append(words, fmt.Sprintf("%s=%#x", port, n))
	}
	return strings.Join(words, " ")
}

const revokeTableOf = `
	ip addr add 192.168.9.9/32 dev lo
	conntrack -I -p udp -s 10.0.0.1 -d 10.0.0.2 --sport 1001 --dport 53 -t 100 -m 0x41000
	conntrack -I -p udp -s 10.0.0.3 -d 10.0.0.2 --sport 1002 --dport 80 -t 100
	conntrack -I -p udp -s 10.0.0.4 -d 10.96.0.1 --sport 1003 --dport 80 -r 10.0.0.2 -q 10.0.0.4 --reply-port-src 8080 --reply-port-dst 1003 -t 100
	conntrack -I -p udp -s fd00::1 -d fd00::2 --sport 1004 --dport 53 -t 100 -m 0x1000
	conntrack -I -p udp -s 10.0.1.1 -d 10.0.1.2 --sport 1005 --dport 53 -t 100 -m 0x1000
	conntrack -I -p udp -s 192.168.9.9 -d 10.0.0.2 --sport 1006 --dport 53 -t 100
	conntrack -I -p udp -s 10.0.0.2 -d 192.168.9.9 --sport 1007 --dport 53 -t 100
	conntrack -I -p udp -s 10.0.0.2 -d 10.0.0.5 --sport 1008 --dport 53 -t 100 -w 3
	conntrack -I -p tcp -s 10.0.0.3 -d 10.0.0.9 --sport 1009 --dport 80 --state TIME_WAIT -t 100`

// TestRevoke follows the marks of connections through changes of policy: only those
// that a change concerns are judged, those denied have the revoked bit and no longer
// the accepted one, others' bits stay, what the node itself says or hears is left
// alone, and what is allowed again is let go on.
func TestRevoke(t *testing.T) {
	for name, entries := range map[string]int{"whole table": 0, "by address": 1_000_000} {
		t.Run(name, func(t *testing.T) { testRevoke(t, entries) })
	}
}

// testRevoke has the looks believe that the table had so many entries before.
func testRevoke(t *testing.T, entries int) {
	kernelNetns(t)
	kernelRun(t, revokeTableOf)
	var out bytes.Buffer
	log := queueLog(&out, 64)
	r := newRevokeRig(t, RevokeConfig{Ring: log.NewRing()})
	r.engine.Swap(revokeSnapshot(nil))
	r.Everything()
	if r.Unready() == nil {
		t.Error("ready before the first look")
	}
	r.look()
	kernelOK(t, r.Unready())
	r.allDue = 0
	untouched := "1001=0x41000 1004=0x1000 1005=0x1000"
	for _, c := range []struct {
		name                      string
		pods                      []revokePod
		marks                     string
		judged, revoked, restored uint64
	}{
		{"all open", nil, untouched, 9, 0, 0},
		{"nobody in", []revokePod{{"10.0.0.2", "-", ""}}, "1001=0x42000 1002=0x2000 1003=0x2000 1004=0x1000 1005=0x1000", 15, 3, 0},
		{"another pod", []revokePod{{"10.0.0.2", "-", ""}, {"10.0.1.2", "10.0.1.1", ""}}, "1001=0x42000 1002=0x2000 1003=0x2000 1004=0x1000 1005=0x1000", 0, 3, 0},
		{"one in again", []revokePod{{"10.0.0.2", "10.0.0.3", ""}, {"10.0.1.2", "10.0.1.1", ""}}, "1001=0x42000 1003=0x2000 1004=0x1000 1005=0x1000", 0, 3, 1},
		{"neither in nor out", []revokePod{{"10.0.0.2", "10.0.0.3", "-"}, {"fd00::2", "-", ""}},
			"1001=0x42000 1003=0x2000 1004=0x2000 1005=0x1000 1008=0x2000", 0, 5, 1},
		{"of one that is over nothing is said", []revokePod{{"10.0.0.2", "10.0.0.3", "-"}, {"fd00::2", "-", ""}, {"10.0.0.9", "-", ""}},
			"1001=0x42000 1003=0x2000 1004=0x2000 1005=0x1000 1008=0x2000 1009=0x2000", 0, 5, 1},
		{"the pods are gone", nil, "1001=0x40000 1005=0x1000", 0, 5, 5},
	} {
		r.entries = entries
		r.change(c.pods...)
		if got := r.marks(); got != c.marks {
			t.Errorf("%s: marks are %s\nwant %s", c.name, got, c.marks)
		}
		s := r.Stats()
		if s.Revoked != c.revoked || s.Restored != c.restored || c.judged != 0 && s.Judged != c.judged {
			t.Errorf("%s: %+v, want %d judged, %d revoked, %d restored", c.name, s, c.judged, c.revoked, c.restored)
		}
	}
	kernelOK(t, log.Close())
	var told []string
	for line := range strings.Lines(out.String()) {
		var l struct {
			Verdict, Reason string
			Src             struct{ IP string }
			Dst             struct {
				IP   string
				Port int
			}
			Egress, Ingress struct{ Policies []string }
		}
		kernelOK(t, json.Unmarshal([]byte(line), &l))
		told = append(told, fmt.Sprint(l.Verdict, " ", l.Reason, " ", l.Src.IP, " ", l.Dst.IP, " ", l.Dst.Port, l.Egress.Policies, l.Ingress.Policies))
	}
	slices.Sort(told)
	want := []string{
		"revoked no-rule 10.0.0.1 10.0.0.2 53 [] [a/in]", "revoked no-rule 10.0.0.2 10.0.0.5 53 [a/out] []",
		"revoked no-rule 10.0.0.3 10.0.0.2 80 [] [a/in]", "revoked no-rule 10.0.0.4 10.0.0.2 8080 [] [a/in]",
		"revoked no-rule fd00::1 fd00::2 53 [] [a/in]",
	}
	if !slices.Equal(told, want) {
		t.Errorf("the log tells\n%s\nwant\n%s", strings.Join(told, "\n"), strings.Join(want, "\n"))
	}
}

// TestLooksAreFew gathers changes: however many there are, each is looked at
// twice, and not one by one.
func TestLooksAreFew(t *testing.T) {
	kernelNetns(t)
	r := newRevokeRig(t, RevokeConfig{})
	r.engine.Swap(revokeSnapshot(nil))
	for i := range 500 {
		r.Changed([]netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})})
	}
	if next := r.look(); next != lookAgain {
		t.Errorf("the second look is due in %v", next)
	}
	r.Changed(kernelAddrs("10.0.0.1"))
	if next := r.look(); next != lookAgain || len(r.due) != 1 {
		t.Errorf("after the second look %d addresses are due, in %v", len(r.due), next)
	}
	if next := r.look(); next != 0 || len(r.due) != 0 {
		t.Errorf("after all looks %d addresses are due, in %v", len(r.due), next)
	}
	if r.look(); r.Stats().Looks != 3 {
		t.Errorf("%d looks", r.Stats().Looks)
	}
}

// TestLookFails takes the right to speak to conntrack from a look: it is told and
// counted, what was due stays so, and once it goes again all is made up for.
func TestLookFails(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, revokeTableOf)
	log, text := kernelLog()
	r := newRevokeRig(t, RevokeConfig{Log: log})
	r.engine.Swap(revokeSnapshot(nil, revokePod{"10.0.0.2", "-", ""}))
	r.Changed(kernelAddrs("10.0.0.2"))
	for range 3 {
		withoutCapabilities(t, func() {
			if next := r.look(); next != retryAfter {
				t.Errorf("tried again in %v", next)
			}
		})
	}
	if err := r.Unready(); err == nil || r.Stats().Errors != 3 || r.due[kernelAddrs("10.0.0.2")[0]] != looksDue {
		t.Errorf("after three failures: %v, %+v, due %v", err, r.Stats(), r.due)
	}
	if n := strings.Count(text.String(), "can't be judged anew"); n != 1 {
		t.Errorf("said %d times: %s", n, text)
	}
	r.look()
	if r.trouble != nil || r.Stats().Revoked != 3 || !strings.Contains(text.String(), "mended") {
		t.Errorf("afterwards: %v, %+v, %s", r.trouble, r.Stats(), text)
	}
}

// withoutCapabilities runs f in this network namespace on a thread that has no
// rights, and that ends with it.
func withoutCapabilities(t *testing.T, f func()) {
	t.Helper()
	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	kernelOK(t, err)
	defer unix.Close(ns)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&head, &none[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// TestLateComersAreSeen puts a connection into the table after the first look at a
// change, as one that another program's queue has held back: the second look finds it.
func TestLateComersAreSeen(t *testing.T) {
	kernelNetns(t)
	r := newRevokeRig(t, RevokeConfig{})
	r.engine.Swap(revokeSnapshot(nil))
	r.change(revokePod{"10.0.0.2", "-", ""})
	kernelRun(t, revokeTableOf)
	if r.look(); r.Stats().Revoked != 3 {
		t.Errorf("%+v", r.Stats())
	}
}

// TestSettle waits for packets that are in hand, and not for others, nor for ever.
func TestSettle(t *testing.T) {
	w := queueTestWorker(queueEngine(), nil, io.Discard)
	q := &Queues{workers: []*worker{w}}
	if !q.Settle() {
		t.Error("an idle worker isn't settled")
	}
	w.turns.Add(1)
	if start := time.Now(); q.Settle() || time.Since(start) < settleWait {
		t.Error("a worker that is held up is settled")
	}
	done := make(chan time.Time, 1)
	go func() {
		time.Sleep(settleWait / 5)
		done <- time.Now()
		w.turns.Add(2) // and has the next packet in hand already
	}()
	if !q.Settle() || time.Now().Before(<-done) {
		t.Error("settled before the packet's verdict was out")
	}
}
