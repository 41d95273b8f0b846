package audit

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"portcullis/verdict"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func pod(key string) *verdict.Endpoint {
	ns, name, _ := strings.Cut(key, "/")
	return &verdict.Endpoint{Namespace: ns, Name: name}
}

// denied and allowed are a record of each kind.
func denied() Record {
	return Record{
		Time: time.Date(2025, 1, 2, 3, 4, 5, 678, time.UTC).UnixNano(), Latency: 4200,
		Flow: verdict.Flow{Src: addr("10.1.0.2"), Dst: addr("10.1.0.3"), SrcPort: 40000, DstPort: 5432, Proto: verdict.TCP},
		Decision: verdict.Decision{Verdict: verdict.Deny, Reason: verdict.ReasonNoRule, Src: pod("a/web"), Dst: pod("b/db"),
			Ingress: verdict.NewSide(verdict.Deny, []string{"b/db", "b/deny"}, verdict.RuleRef{})},
	}
}

func allowed() Record {
	return Record{
		Time: time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC).UnixNano(), Latency: 900,
		Flow: verdict.Flow{Src: addr("fd00::2"), Dst: addr("2001:db8::1"), Proto: verdict.ICMPv6, ICMPType: 128},
		Decision: verdict.Decision{Verdict: verdict.Allow, Reason: verdict.ReasonRule, Cached: true, Src: pod("a/web"),
			Egress:  verdict.NewSide(verdict.Allow, []string{"a/out"}, verdict.RuleRef{Policy: "a/out", Rule: 2}),
			Ingress: verdict.Side{Verdict: verdict.Allow}},
	}
}

// lineOf is the line that tells of one decision.
func lineOf(node string, rec Record) []byte {
	return appendTally(appendRecord(nil, node, false, &rec), tally{count: 1})
}

func TestLine(t *testing.T) {
	truncated := denied()
	truncated.Flow = verdict.Flow{Proto: verdict.TCP, SrcPort: 1, Defect: verdict.ReasonTruncated}
	truncated.Decision = verdict.Decision{Reason: verdict.ReasonTruncated}
	gre := allowed()
	gre.Flow.Proto, gre.Flow.ICMPType = 47, 0
	gre.Decision = verdict.Decision{Verdict: verdict.Allow, Reason: verdict.ReasonNotIsolated,
		Egress: verdict.Side{Judged: true, Verdict: verdict.Allow}, Ingress: verdict.Side{Judged: true, Verdict: verdict.Allow}}
	for _, c := range []struct {
		name string
		rec  Record
		want string
	}{
		{"denied", denied(), `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:05.000000678Z","node":"n1","verdict":"deny","reason":"no-rule","directions":["ingress"],"protocol":"TCP",` +
			`"src":{"ip":"10.1.0.2","port":40000,"kind":"pod","namespace":"a","pod":"web"},"dst":{"ip":"10.1.0.3","port":5432,"kind":"pod","namespace":"b","pod":"db"},` +
			`"ingress":{"verdict":"deny","isolated":true,"policies":["b/db","b/deny"],"allowedBy":null},"cached":false,"latencyNs":4200,"count":1}`},
		{"allowed", allowed(), `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:05Z","node":"n1","verdict":"allow","reason":"rule","directions":["egress"],"protocol":"ICMPv6",` +
			`"src":{"ip":"fd00::2","kind":"pod","namespace":"a","pod":"web"},"dst":{"ip":"2001:db8::1","kind":"unknown"},"icmpType":128,"icmpCode":0,` +
			`"egress":{"verdict":"allow","isolated":true,"policies":["a/out"],"allowedBy":{"policy":"a/out","rule":2}},"cached":true,"latencyNs":900,"count":1}`},
		{"truncated", truncated, `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:05.000000678Z","node":"n1","verdict":"deny","reason":"truncated","directions":[],"protocol":"TCP",` +
			`"src":{"ip":"","kind":"unknown"},"dst":{"ip":"","kind":"unknown"},"cached":false,"latencyNs":4200,"count":1}`},
		{"another protocol", gre, `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:05Z","node":"n1","verdict":"allow","reason":"not-isolated","directions":["egress","ingress"],"protocol":"47",` +
			`"src":{"ip":"fd00::2","kind":"unknown"},"dst":{"ip":"2001:db8::1","kind":"unknown"},"egress":{"verdict":"allow","isolated":false,"policies":[],"allowedBy":null},` +
			`"ingress":{"verdict":"allow","isolated":false,"policies":[],"allowedBy":null},"cached":false,"latencyNs":900,"count":1}`},
	} {
		got := string(lineOf("n1", c.rec))
		if got != c.want+"\n" {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
		if !json.Valid([]byte(got)) {
			t.Errorf("%s: not JSON", c.name)
		}
	}
}

// A name with odd bytes stays one string on one line, and reads back.
func TestLineOddNames(t *testing.T) {
	for _, name := range []string{"a\"b", "a\\b", "a\nb", "a\x00\x1f\x7fb", "é€\u2028", "</script>", "\xff\xfe", "", strings.Repeat("x", 300)} {
		rec := denied()
		rec.Decision.Src = &verdict.Endpoint{Namespace: name, Name: name}
		rec.Decision.Ingress = verdict.NewSide(verdict.Deny, []string{name}, verdict.RuleRef{})
		line := lineOf(name, rec)
		if bytes.IndexByte(line, '\n') != len(line)-1 {
			t.Errorf("%q breaks its line: %q", name, line)
		}
		var got struct {
			Node string
			Src  struct{ Pod, Namespace string }
		}
		if err := json.Unmarshal(line, &got); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		if want := strings.ToValidUTF8(name, "\ufffd"); name != "\xff\xfe" && (got.Node != want || got.Src.Pod != want || got.Src.Namespace != want) {
			t.Errorf("%q came back as %+v", name, got)
		}
	}
}

func FuzzLine(f *testing.F) {
	f.Add("a", "b", uint8(6), uint8(0))
	f.Add("a\"\n", "\xff", uint8(58), uint8(8))
	f.Add("\x1b]0;title\a", "\u009b31m\u202e\x7f\U000e0001", uint8(6), uint8(6))
	f.Fuzz(func(t *testing.T, ns, name string, proto, reason uint8) {
		rec := denied()
		rec.Flow.Proto, rec.Decision.Reason = verdict.Protocol(proto), verdict.Reason(reason)
		rec.Decision.Dst = &verdict.Endpoint{Namespace: ns, Name: name}
		rec.Decision.Ingress = verdict.NewSide(verdict.Deny, []string{"b/db"}, verdict.RuleRef{Policy: ns + "/" + name})
		rec.Decision.Dst.Workload, rec.Decision.Dst.Labels = name, map[string]string{ns: name, name: ns}
		rec.Snapshot = verdict.NewSnapshot(verdict.Input{Generation: 1, Versions: map[string]string{"b/db": name}}, nil)
		line := appendTally(appendRecord(nil, name, true, &rec), tally{count: 2, sample: 3})
		if !json.Valid(line) || bytes.IndexByte(line, '\n') != len(line)-1 {
			t.Errorf("%q", line)
		}
		for _, r := range string(bytes.TrimSuffix(line, []byte("\n"))) {
			if !unicode.IsPrint(r) {
				t.Errorf("%q: a terminal would obey %q", line, r)
			}
		}
		var back struct {
			Dst struct{ Pod, Namespace string }
		}
		if err := json.Unmarshal(line, &back); err != nil || utf8.ValidString(ns) && utf8.ValidString(name) && (back.Dst.Pod != name || back.Dst.Namespace != ns) {
			t.Errorf("%q reads as %+v (%v), want %q %q", line, back, err, ns, name)
		}
	})
}

func TestRing(t *testing.T) {
	r := newRing(3) // four slots
	put := func(n int64) bool { return r.Put(&Record{Time: n}) }
	take := func() (n int64) { r.take(func(rec *Record) { n = rec.Time }); return n }
	var got []int64
	for n := range int64(4) {
		if !put(n + 1) {
			t.Errorf("record %d doesn't fit", n+1)
		}
	}
	if put(5) || r.Lost() != 1 {
		t.Errorf("a full ring took a record, lost %d", r.Lost())
	}
	got = append(got, take(), take())
	if !put(6) || !put(7) || put(8) || r.Lost() != 2 {
		t.Errorf("room for two: lost %d", r.Lost())
	}
	got = append(got, take(), take(), take(), take(), take())
	if want := []int64{1, 2, 3, 4, 6, 7, 0}; !reflect.DeepEqual(got, want) {
		t.Errorf("took %v, want %v", got, want)
	}
	for i := range r.slots {
		if r.slots[i].Decision.Src != nil || r.slots[i].Time != 0 {
			t.Errorf("slot %d still holds a record", i)
		}
	}
}

// One goroutine puts as fast as it can, one takes: every record arrives once,
// whole and in order, or is counted as lost.
func TestRingConcurrent(t *testing.T) {
	const records = 50000
	r := newRing(64)
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for n := range int64(records) {
			r.Put(&Record{Time: n + 1, Latency: -n - 1, Flow: verdict.Flow{SrcPort: uint16(n + 1)}})
		}
	})
	last, taken := int64(0), uint64(0)
	use := func(rec *Record) {
		if rec.Time <= last || rec.Latency != -rec.Time || rec.Flow.SrcPort != uint16(rec.Time) {
			t.Errorf("after %d: %+v", last, rec)
		}
		last = rec.Time
		taken++
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		for r.take(use) {
		}
	}
	wg.Wait()
	if taken+r.Lost() != records || taken == 0 {
		t.Errorf("%d taken, %d lost of %d", taken, r.Lost(), records)
	}
}

func TestRingNoAllocs(t *testing.T) {
	r, rec := newRing(8), denied()
	if n := testing.AllocsPerRun(100, func() { r.Put(&rec) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if r.Lost() == 0 {
		t.Error("the ring never was full")
	}
}

// BenchmarkPut is what a packet pays for the log: the making of its record and
// the putting, and here the taking too.
func BenchmarkPut(b *testing.B) {
	flow, decision := denied().Flow, denied().Decision
	s := verdict.NewSnapshot(verdict.Input{Generation: 1}, nil)
	drop := func(*Record) {}
	var rec Record
	for name, r := range map[string]*Ring{"on": newRing(1024), "off": nil} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if r == nil {
					continue
				}
				rec.Time, rec.Latency, rec.Flow, rec.Decision, rec.Snapshot = 1, 2, flow, decision, s
				if !r.Put(&rec) {
					b.Fatal("full")
				}
				r.take(drop)
			}
		})
	}
}

func BenchmarkLine(b *testing.B) {
	rec, buf := denied(), make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		buf = appendTally(appendRecord(buf[:0], "n1", false, &rec), tally{count: 1})
	}
	b.SetBytes(int64(len(buf)))
}
