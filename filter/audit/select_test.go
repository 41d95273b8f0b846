package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"portcullis/verdict"
)

// told is what these tests read of a line.
type told struct {
	Kind, Verdict, Reason string
	Time, LastTime        time.Time
	Count, Sample         uint64
	Suppressed, Lost      uint64
	Src                   struct{ Port uint16 }
}

// read gives the lines of the kind "decision" and the sums of the others, and
// holds each to the schema.
func read(t *testing.T, text string) (decisions []told, suppressed, lost uint64) {
	t.Helper()
	schema := schema(t)
	for line := range strings.Lines(text) {
		var l told
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if err := valid(schema, line); err != nil {
			t.Errorf("%v: %s", err, line)
		}
		suppressed, lost = suppressed+l.Suppressed, lost+l.Lost
		if l.Kind == "decision" {
			decisions = append(decisions, l)
		}
	}
	return decisions, suppressed, lost
}

// logged runs a log in a bubble of its own, puts what put puts, and gives what
// was written and the log's counts.
func logged(t *testing.T, cfg Config, put func(put func(Record))) (text string, s Stats) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		cfg.Node, cfg.Sinks = "n1", []Sink{{"test", &out}}
		l := NewLog(cfg)
		r := l.NewRing()
		put(func(rec Record) { r.Put(&rec) })
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		text, s = out.String(), l.Stats()
	})
	return text, s
}

// TestRepeats gathers the SYNs of one denied connection, and nothing else, into
// one record, at the end of its window or at the log's.
func TestRepeats(t *testing.T) {
	x := denied()
	text, s := logged(t, Config{Window: 10 * time.Second}, func(put func(Record)) {
		for _, pause := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second} {
			x.Time = time.Now().UnixNano()
			put(x) // at 0, 1, 3 and 7 s; the fifth at 15 s is another window's
			time.Sleep(pause)
		}
		x.Time = time.Now().UnixNano()
		put(x)
		other := x
		other.Flow.SrcPort++
		put(other)
		put(allowed())
		put(allowed())
	})
	lines, _, _ := read(t, text)
	if len(lines) != 5 || s.Sinks[0].Written != 8 || s.Held != 0 {
		t.Fatalf("%+v\n%s", s, text)
	}
	if first := lines[0]; first.Count != 4 || first.LastTime.Sub(first.Time) != 7*time.Second {
		t.Errorf("the first window: %+v", first)
	}
	// What has no window comes before what is flushed with the log.
	for i, want := range []uint64{4, 1, 1, 1, 1} {
		if lines[i].Count != want || want == 1 && !lines[i].LastTime.IsZero() {
			t.Errorf("line %d: %+v", i, lines[i])
		}
	}
	if lines[1].Verdict != "allow" || lines[3].Verdict != "deny" {
		t.Errorf("out of order:\n%s", text)
	}
}

// TestRepeatsOfAnotherCause begins a new record when the same connection is
// denied by other policies: no record tells of two causes.
func TestRepeatsOfAnotherCause(t *testing.T) {
	x, y := denied(), denied()
	y.Decision.Ingress = verdict.NewSide(verdict.Deny, []string{"b/other"}, verdict.RuleRef{})
	z := y
	z.Decision.Dst = &verdict.Endpoint{Namespace: "b", Name: "db", Meaning: 1}
	text, _ := logged(t, Config{Window: time.Hour}, func(put func(Record)) {
		for _, rec := range []Record{x, x, y, y, y, z} {
			put(rec)
		}
	})
	lines, _, _ := read(t, text)
	if len(lines) != 3 || lines[0].Count != 2 || lines[1].Count != 3 || lines[2].Count != 1 {
		t.Errorf("%s", text)
	}
}

// TestRepeatsAreBounded: a scan of many ports has no more windows than allowed; the
// oldest give way and are written.
func TestRepeatsAreBounded(t *testing.T) {
	now, emitted := time.Now(), uint64(0)
	r := newRepeats(time.Hour, func(*Record) []byte { return nil }, func(_ []byte, t tally) { emitted += t.count })
	const scanned = 2*maxHeld + 5
	for i := range scanned {
		rec := denied()
		rec.Flow.SrcPort, rec.Flow.DstPort = uint16(i), uint16(i>>16)
		r.add(&rec, now)
	}
	if r.open.Len() != maxHeld || r.held != maxHeld || emitted != scanned-maxHeld {
		t.Errorf("%d windows, %d held, %d written", r.open.Len(), r.held, emitted)
	}
	r.expire(now.Add(time.Hour))
	if r.open.Len() != 0 || r.held != 0 || emitted != scanned {
		t.Errorf("after the windows: %d open, %d held, %d written", r.open.Len(), r.held, emitted)
	}
}

// TestHeldLetsGo: a window doesn't keep the snapshot alive that it tells of.
func TestHeldLetsGo(t *testing.T) {
	s, _ := snapshot()
	gone := make(chan struct{})
	runtime.AddCleanup(s, func(struct{}) { close(gone) }, struct{}{})
	r := newRepeats(time.Hour, func(rec *Record) []byte { return appendRecord(nil, "n1", true, rec) }, func([]byte, tally) {})
	rec := decide(s, "192.0.2.129", "10.1.0.3", verdict.TCP)
	r.add(&rec, time.Now())
	rec, s = Record{}, nil
	for range 1000 {
		runtime.GC()
		select {
		case <-gone:
			if r.held != 1 {
				t.Errorf("%d held", r.held)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Error("the snapshot is still there")
}

// TestSelection tries the flag and the annotations of both ends' namespaces.
func TestSelection(t *testing.T) {
	ask := func(rec Record, src, dst verdict.Audit) Record {
		rec.Decision.Src = &verdict.Endpoint{Namespace: "a", Name: "web", Audit: src}
		rec.Decision.Dst = &verdict.Endpoint{Namespace: "b", Name: "db", Audit: dst}
		return rec
	}
	both := func(rec Record) Record {
		rec.Decision.Egress.Judged, rec.Decision.Ingress.Judged = true, true
		return rec
	}
	const none, denials, all, unset = verdict.AuditNone, verdict.AuditDenied, verdict.AuditAll, verdict.AuditDefault
	nobody := denied()
	nobody.Decision = verdict.Decision{Reason: verdict.ReasonNotReady}
	for _, c := range []struct {
		name string
		flag verdict.Audit
		rec  Record
		want bool
	}{
		{"all", all, allowed(), true},
		{"denied, an allow", denials, allowed(), false},
		{"denied, a denial", denials, denied(), true},
		{"none", none, denied(), false},
		{"the judged end asks for none", all, ask(denied(), unset, none), false},
		{"the other end asks for none", all, ask(denied(), none, unset), true},
		{"the judged end asks for all", none, ask(allowed(), all, unset), true},
		{"the judged end asks for denials", all, ask(allowed(), denials, all), false},
		{"both are judged, one wants it", none, both(ask(allowed(), unset, all)), true},
		{"both are judged, one has no wish", all, both(ask(allowed(), none, unset)), true},
		{"both are judged, none wants it", all, both(ask(denied(), none, none)), false},
		{"nobody is judged", denials, nobody, true},
	} {
		_, s := logged(t, Config{Audit: c.flag}, func(put func(Record)) { put(c.rec) })
		if (s.Sinks[0].Written == 1) != c.want || s.Sinks[0].Written+s.Unselected != 1 {
			t.Errorf("%s: %+v", c.name, s)
		}
	}
}

// TestSampling keeps one in so many allows, exactly, and every denial.
func TestSampling(t *testing.T) {
	text, s := logged(t, Config{Sample: 10, RingSize: 4096}, func(put func(Record)) {
		for range 1000 {
			put(allowed())
		}
		for range 10 {
			put(denied())
		}
	})
	lines, _, _ := read(t, text)
	if s.Sampled != 900 || s.Sinks[0].Written != 110 || len(lines) != 110 {
		t.Errorf("%+v", s)
	}
	for _, l := range lines {
		if (l.Sample == 10) != (l.Verdict == "allow") {
			t.Errorf("%+v", l)
		}
	}
}

// TestRate writes so many records a second, and tells how many decisions are
// missing for it.
func TestRate(t *testing.T) {
	text, s := logged(t, Config{Rate: 5, RingSize: 64}, func(put func(Record)) {
		for range 3 {
			for range 20 {
				put(allowed())
			}
			time.Sleep(1100 * time.Millisecond)
		}
	})
	lines, suppressed, lost := read(t, text)
	if len(lines) != 15 || s.Suppressed != 45 || suppressed != 45 || lost != 0 || s.Sinks[0].Written != 15 {
		t.Errorf("%d lines, told %d: %+v", len(lines), suppressed, s)
	}
	if n := strings.Count(text, `"kind":"missing"`); n < 3 {
		t.Errorf("told %d times that records are missing:\n%s", n, text)
	}
}

// TestTwoSinks: one that is stuck costs the other nothing.
func TestTwoSinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		w := make(stuck)
		l := NewLog(Config{Node: "n1", Sinks: []Sink{{"stuck", w}, {"good", &out}}, RingSize: 16})
		r := l.NewRing()
		const puts = 32_000 // more than a sink's queue takes
		for i := range puts {
			rec := allowed()
			r.Put(&rec)
			if i%16 == 15 {
				time.Sleep(pollEvery)
				synctest.Wait()
			}
		}
		err := l.Close()
		s := l.Stats()
		if err == nil || !strings.Contains(err.Error(), "stuck") || strings.Contains(err.Error(), "good") {
			t.Errorf("Close: %v", err)
		}
		if again := l.Close(); again == nil {
			t.Error("closed twice, and nothing is stuck any more")
		}
		lines := strings.Count(out.String(), `"kind":"decision"`)
		bad, good := s.Sinks[0], s.Sinks[1]
		if bad.Written != 0 || bad.Lost != puts || good.Written != puts || good.Lost != 0 || lines != puts || strings.Count(out.String(), "\n") != puts {
			t.Errorf("%+v, %d lines", s, lines)
		}
		close(w)
		synctest.Wait()
		if again := l.Stats(); again.Sinks[0] != bad {
			t.Errorf("what was given up is counted again: %+v", again.Sinks[0])
		}
	})
}

// whimsical takes, refuses, or takes a part, as chance has it.
type whimsical struct {
	bytes.Buffer
	r *rand.Rand
}

func (w *whimsical) Write(b []byte) (int, error) {
	if w.r.IntN(3) > 0 {
		return w.Buffer.Write(b)
	}
	n, _ := w.Buffer.Write(b[:w.r.IntN(len(b)+1)])
	return n, fmt.Errorf("no space left")
}

// TestEveryDecisionIsAccountedFor runs logs of random configurations on random
// traffic into unreliable sinks: whatever happens, what was written, left out,
// suppressed and lost are all decisions, and the lines themselves tell the same.
func TestEveryDecisionIsAccountedFor(t *testing.T) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	defer slog.SetDefault(old)
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) { account(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func account(t *testing.T, r *rand.Rand) {
	w := &whimsical{r: rand.New(rand.NewPCG(r.Uint64(), 2))}
	l := NewLog(Config{
		Node: "n1", Sinks: []Sink{{"test", w}}, RingSize: 1 << r.IntN(8), Window: time.Duration(r.IntN(3)) * time.Second,
		Audit: verdict.Audit(r.IntN(4)), Sample: r.IntN(4), Rate: r.IntN(3) * 50,
	})
	rings := []*Ring{l.NewRing(), l.NewRing()}
	total := uint64(2000)
	for i := range total {
		rec := allowed()
		if r.IntN(2) == 0 {
			rec = denied()
			rec.Flow.SrcPort = uint16(r.IntN(20))
		}
		rec.Time = time.Now().UnixNano()
		rings[i%2].Put(&rec)
		if r.IntN(20) == 0 {
			time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	s := l.Stats()
	sink := s.Sinks[0]
	if sum := sink.Written + sink.Lost + s.Unselected + s.Sampled + s.Suppressed; sum != total || s.Held != 0 {
		t.Errorf("%d of %d decisions are accounted for: %+v", sum, total, s)
	}
	var written, suppressed, lost uint64
	for line := range strings.Lines(w.String()) {
		var l told
		if json.Unmarshal([]byte(line), &l) == nil && strings.HasSuffix(line, "}\n") {
			written, suppressed, lost = written+l.Count, suppressed+l.Suppressed, lost+l.Lost
		}
	}
	// The last word may be among what the sink refused.
	if written != sink.Written || suppressed > s.Suppressed || lost > sink.Lost {
		t.Errorf("the lines tell %d written, %d suppressed, %d lost: %+v", written, suppressed, lost, s)
	}
}
