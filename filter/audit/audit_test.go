package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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
			Ingress: verdict.Side{Judged: true, Isolated: true, Policies: []string{"b/db", "b/deny"}}},
	}
}

func allowed() Record {
	return Record{
		Time: time.Date(2025, 1, 2, 3, 4, 5, 0, time.UTC).UnixNano(), Latency: 900,
		Flow: verdict.Flow{Src: addr("fd00::2"), Dst: addr("2001:db8::1"), Proto: verdict.ICMPv6, ICMPType: 128},
		Decision: verdict.Decision{Verdict: verdict.Allow, Reason: verdict.ReasonRule, Cached: true, Src: pod("a/web"),
			Egress: verdict.Side{Judged: true, Isolated: true, Verdict: verdict.Allow, Policies: []string{"a/out"},
				AllowedBy: verdict.RuleRef{Policy: "a/out", Rule: 2}},
			Ingress: verdict.Side{Verdict: verdict.Allow}},
	}
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
		{"denied", denied(), `{"time":"2025-01-02T03:04:05.000000678Z","node":"n1","verdict":"deny","reason":"no-rule","directions":["ingress"],"protocol":"TCP",` +
			`"src":{"ip":"10.1.0.2","port":40000,"namespace":"a","pod":"web"},"dst":{"ip":"10.1.0.3","port":5432,"namespace":"b","pod":"db"},` +
			`"ingress":{"verdict":"deny","isolated":true,"policies":["b/db","b/deny"],"allowedBy":null},"cached":false,"latencyNs":4200}`},
		{"allowed", allowed(), `{"time":"2025-01-02T03:04:05Z","node":"n1","verdict":"allow","reason":"rule","directions":["egress"],"protocol":"ICMPv6",` +
			`"src":{"ip":"fd00::2","namespace":"a","pod":"web"},"dst":{"ip":"2001:db8::1"},"icmpType":128,"icmpCode":0,` +
			`"egress":{"verdict":"allow","isolated":true,"policies":["a/out"],"allowedBy":{"policy":"a/out","rule":2}},"cached":true,"latencyNs":900}`},
		{"truncated", truncated, `{"time":"2025-01-02T03:04:05.000000678Z","node":"n1","verdict":"deny","reason":"truncated","directions":[],"protocol":"TCP",` +
			`"src":{"ip":""},"dst":{"ip":""},"cached":false,"latencyNs":4200}`},
		{"another protocol", gre, `{"time":"2025-01-02T03:04:05Z","node":"n1","verdict":"allow","reason":"not-isolated","directions":["egress","ingress"],"protocol":"47",` +
			`"src":{"ip":"fd00::2"},"dst":{"ip":"2001:db8::1"},"egress":{"verdict":"allow","isolated":false,"policies":[],"allowedBy":null},` +
			`"ingress":{"verdict":"allow","isolated":false,"policies":[],"allowedBy":null},"cached":false,"latencyNs":900}`},
	} {
		got := string(appendLine(nil, "n1", &c.rec))
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
		rec.Decision.Ingress.Policies = []string{name}
		line := appendLine(nil, name, &rec)
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
	f.Fuzz(func(t *testing.T, ns, name string, proto, reason uint8) {
		rec := denied()
		rec.Flow.Proto, rec.Decision.Reason = verdict.Protocol(proto), verdict.Reason(reason)
		rec.Decision.Dst = &verdict.Endpoint{Namespace: ns, Name: name}
		rec.Decision.Ingress.AllowedBy.Policy = ns + "/" + name
		line := appendLine(nil, name, &rec)
		if !json.Valid(line) || bytes.IndexByte(line, '\n') != len(line)-1 {
			t.Errorf("%q", line)
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

func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := NewLog(&out, "n1", 16)
		a, b := l.NewRing(), l.NewRing()
		x, y := denied(), allowed()
		a.Put(&x)
		b.Put(&y)
		time.Sleep(pollEvery + time.Millisecond)
		synctest.Wait()
		if l.Written() != 2 {
			t.Errorf("%d written after a poll", l.Written())
		}
		a.Put(&y)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		want := string(appendLine(nil, "n1", &x)) + string(appendLine(nil, "n1", &y)) + string(appendLine(nil, "n1", &y))
		if out.String() != want || l.Written() != 3 || l.Lost() != 0 || l.Failures() != 0 {
			t.Errorf("%d written, %d lost:\n%s", l.Written(), l.Lost(), out.String())
		}
		if err := l.Close(); err != nil {
			t.Errorf("closed twice: %v", err)
		}
	})
}

func TestLogOff(t *testing.T) {
	l := NewLog(nil, "n1", 0)
	r, rec := l.NewRing(), denied()
	if !r.Put(&rec) || l.Written() != 0 || l.Lost() != 0 || l.Failures() != 0 || l.Close() != nil {
		t.Error("a log that is off does something")
	}
}

// Workers and the log at once, for the race detector: nothing vanishes.
func TestLogConcurrent(t *testing.T) {
	pr, pw := io.Pipe()
	l := NewLog(pw, "n1", 256)
	var lines uint64
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(pr); s.Scan(); lines++ {
			if !json.Valid(s.Bytes()) {
				t.Errorf("not JSON: %s", s.Text())
			}
		}
	}()
	var wg sync.WaitGroup
	for range 3 {
		ring := l.NewRing()
		wg.Go(func() {
			x, y := denied(), allowed()
			for range 1000 {
				ring.Put(&x)
				ring.Put(&y)
			}
		})
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	pw.Close()
	<-read
	if lines != l.Written() || l.Written()+l.Lost() != 6000 || lines == 0 {
		t.Errorf("%d lines, %d written, %d lost", lines, l.Written(), l.Lost())
	}
}

// stuck is a writer that never returns until it is let go.
type stuck chan struct{}

func (s stuck) Write(b []byte) (int, error) { <-s; return len(b), nil }

// A writer that blocks costs records, never the worker's time.
func TestLogBlockedWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := make(stuck)
		l := NewLog(w, "n1", 4)
		r, rec := l.NewRing(), denied()
		r.Put(&rec)
		time.Sleep(2 * pollEvery)
		begin := time.Now()
		for range 100 {
			r.Put(&rec)
		}
		if time.Since(begin) != 0 || l.Lost() != 96 {
			t.Errorf("puts took %s, %d lost", time.Since(begin), l.Lost())
		}
		if err := l.Close(); err == nil {
			t.Error("Close says nothing about a writer that blocks")
		}
		close(w)
	})
}

// flaky takes a few bytes and fails, as often as it is told.
type flaky struct {
	bytes.Buffer
	fail, take int
}

func (f *flaky) Write(b []byte) (int, error) {
	if f.fail == 0 {
		return f.Buffer.Write(b)
	}
	f.fail--
	n, _ := f.Buffer.Write(b[:min(f.take, len(b))])
	return n, errors.New("no space left")
}

// A failing writer is counted, complained of once, and spoils no later line.
func TestLogFailingWriter(t *testing.T) {
	for _, take := range []int{0, 10, 1 << 20} {
		var said bytes.Buffer
		old := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(&said, nil)))
		synctest.Test(t, func(t *testing.T) {
			w := &flaky{fail: 2, take: take}
			l := NewLog(w, "n1", 16)
			r, rec := l.NewRing(), denied()
			for range 4 {
				r.Put(&rec)
				time.Sleep(2 * pollEvery)
			}
			l.Close()
			good := uint64(0)
			for line := range strings.Lines(w.String()) {
				if json.Valid([]byte(line)) && strings.HasPrefix(line, "{") {
					good++
				}
			}
			if good < 2 || good != l.Written() || l.Written()+l.Lost() != 4 || l.Failures() == 0 {
				t.Errorf("%d bytes taken: %d good lines, %d written, %d lost, %d failures", take, good, l.Written(), l.Lost(), l.Failures())
			}
		})
		slog.SetDefault(old)
		if n := strings.Count(said.String(), "\n"); n != 1 {
			t.Errorf("%d bytes taken: said %d times:\n%s", take, n, said.String())
		}
	}
}

// stubborn takes part of one write, nothing of the next, and then all.
type stubborn struct {
	bytes.Buffer
	writes int
}

func (s *stubborn) Write(b []byte) (int, error) {
	switch s.writes++; s.writes {
	case 1:
		n, _ := s.Buffer.Write(b[:10])
		return n, errors.New("no space left")
	case 2:
		return 0, errors.New("no space left")
	}
	return s.Buffer.Write(b)
}

// A line's remains that can't be ended yet spoil no line: what was to follow is
// lost, counted as such.
func TestLogTornLine(t *testing.T) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	defer slog.SetDefault(old)
	synctest.Test(t, func(t *testing.T) {
		w := &stubborn{}
		l := NewLog(w, "n1", 16)
		r, rec := l.NewRing(), denied()
		for range 3 {
			r.Put(&rec)
			time.Sleep(2 * pollEvery)
		}
		l.Close()
		lines := strings.Split(w.String(), "\n")
		if l.Written() != 1 || l.Lost() != 2 || len(lines) != 3 || !json.Valid([]byte(lines[1])) {
			t.Errorf("%d written, %d lost, lines %q", l.Written(), l.Lost(), lines)
		}
	})
}

// A file that was renamed goes on until it is opened anew; if that fails, too.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log", "decisions")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	w, err := OpenSink(path)
	if err != nil {
		t.Fatal(err)
	}
	f := w.(*File)
	io.WriteString(f, "one\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "two\n")
	if err := f.Reopen(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(f, "three\n")
	if err := os.Rename(filepath.Dir(path), filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if err := f.Reopen(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a directory that has gone: %v", err)
	}
	io.WriteString(f, "four\n")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"decisions.1": "one\ntwo\n", "decisions": "three\nfour\n"} {
		if b, err := os.ReadFile(filepath.Join(dir, "away", name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

func TestOpenSink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "decisions")
	for _, s := range []string{"one\n", "two\n"} {
		w, err := OpenSink(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, s); err != nil || w.Close() != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	info, _ := os.Stat(path)
	if err != nil || string(b) != "one\ntwo\n" || info.Mode().Perm() != 0o600 {
		t.Errorf("%q, %v, %v", b, info.Mode(), err)
	}
	if _, err := OpenSink(filepath.Join(path, "below")); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a path that can't be: %v", err)
	}
	if w, err := OpenSink("-"); err != nil || w.Close() != nil {
		t.Errorf("the standard output: %v", err)
	}
}

func BenchmarkPut(b *testing.B) {
	r, rec := newRing(1024), denied()
	drop := func(*Record) {}
	b.ReportAllocs()
	for b.Loop() {
		if !r.Put(&rec) {
			b.Fatal("full")
		}
		r.take(drop)
	}
}

func BenchmarkLine(b *testing.B) {
	rec, buf := denied(), make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		buf = appendLine(buf[:0], "n1", &rec)
	}
	b.SetBytes(int64(len(buf)))
}
