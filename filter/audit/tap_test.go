package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"portcullis/verdict"
)

// tapped is a log with a tap and the sinks given.
func tapped(t *testing.T, cfg Config) (*Log, *Ring, *Tap) {
	t.Helper()
	cfg.Node, cfg.Tap = "n1", NewTap()
	l := NewLog(cfg)
	t.Cleanup(func() { l.Close() })
	return l, l.NewRing(), cfg.Tap
}

// next waits for so many lines.
func next(t *testing.T, s *Subscriber, n int) (lines []string, lost uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for len(lines) < n {
		b, l, err := s.Next(ctx)
		if err != nil {
			t.Fatalf("%d of %d lines, %d lost: %v", len(lines), n, lost, err)
		}
		lost += l
		for line := range bytes.Lines(b) {
			lines = append(lines, string(line))
		}
	}
	return lines, lost
}

// TestTapSeesAllAtOnce: what the log leaves out, samples away or holds in a window is
// seen, each time, at once; and the log writes what it writes without a tap.
func TestTapSeesAllAtOnce(t *testing.T) {
	var sink bytes.Buffer
	l, ring, tap := tapped(t, Config{Sinks: []Sink{{"file", &sink}}, Window: time.Hour, Audit: verdict.AuditDenied})
	_, s := tap.Last(true)
	defer s.Close()
	d, a := denied(), allowed()
	for range 3 {
		ring.Put(&d)
	}
	ring.Put(&a)
	lines, lost := next(t, s, 4)
	if want := string(lineOf("n1", denied())); lost != 0 || lines[0] != want || lines[2] != want || lines[3] != string(lineOf("n1", allowed())) {
		t.Errorf("%d lost, %q", lost, lines)
	}
	if last, none := tap.Last(false); len(last) != 4 || string(last[3]) != lines[3] || none != nil {
		t.Errorf("the last: %q", last)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if got := sink.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `"count":3`) {
		t.Errorf("the sink has %q", got)
	}
	if st := l.Stats(); st.Sinks[0].Written != 3 || st.Unselected != 1 {
		t.Errorf("%+v", st)
	}
}

// TestTapKeepsTheLast: no more than it has room for, the newest, in order.
func TestTapKeepsTheLast(t *testing.T) {
	tap := NewTap()
	rec := allowed()
	for i := range tapLines + 100 {
		tap.put(&rec, fmt.Appendf(nil, "%d\n", i))
	}
	last, _ := tap.Last(false)
	if len(last) != tapLines || string(last[0]) != "100\n" || string(last[tapLines-1]) != fmt.Sprintf("%d\n", tapLines+99) {
		t.Errorf("%d lines, %q to %q", len(last), last[0], last[len(last)-1])
	}
}

// TestSlowSubscriber reads nothing while more comes than waits for him: he gets what
// fits, and the exact count of the rest; another one, and a sink, get all.
func TestSlowSubscriber(t *testing.T) {
	sink := &counting{}
	l, ring, tap := tapped(t, Config{Sinks: []Sink{{"file", sink}}, RingSize: 8192})
	_, slow := tap.Last(true)
	defer slow.Close()
	_, quick := tap.Last(true)
	defer quick.Close()
	const n = 6000
	rec := allowed()
	got := 0
	for i := range n {
		ring.Put(&rec)
		if i%500 == 499 {
			lines, lost := next(t, quick, 500)
			if got += len(lines); lost != 0 {
				t.Fatalf("the quick one lost %d", lost)
			}
		}
	}
	lines, lost := next(t, slow, 1)
	if got != n || lost == 0 || uint64(len(lines))+lost != n {
		t.Errorf("of %d: quick %d, slow %d and %d lost", n, got, len(lines), lost)
	}
	if err := l.Close(); err != nil || sink.lines != n {
		t.Errorf("the sink has %d: %v", sink.lines, err)
	}
}

type counting struct{ lines int }

func (c *counting) Write(b []byte) (int, error) {
	c.lines += bytes.Count(b, []byte{'\n'})
	return len(b), nil
}

// TestTapTellsOfFullRings: what found a ring full is told to who looks.
func TestTapTellsOfFullRings(t *testing.T) {
	tap := NewTap()
	_, s := tap.Last(true)
	tap.missed(3)
	tap.missed(3)
	tap.missed(5)
	if _, lost, err := s.Next(t.Context()); err != nil || lost != 5 {
		t.Errorf("%d lost, %v", lost, err)
	}
	var line struct {
		Kind string
		Lost uint64
	}
	if err := json.Unmarshal(MissingLine("n1", time.Now(), 5), &line); err != nil || line.Kind != "missing" || line.Lost != 5 {
		t.Errorf("%+v: %v", line, err)
	}
	s.Close()
	tap.missed(9)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.Next(ctx); err == nil {
		t.Error("a closed subscription goes on")
	}
}

// TestDenied counts by kind, the most often first, and keeps a bounded number.
func TestDenied(t *testing.T) {
	_, ring, tap := tapped(t, Config{})
	d, other, a := denied(), denied(), allowed()
	other.Flow.DstPort, other.Time = 80, d.Time+1
	for _, rec := range []*Record{&d, &other, &other, &a} {
		ring.Put(rec)
	}
	_, s := tap.Last(true)
	defer s.Close()
	deadline := time.Now().Add(10 * time.Second)
	for len(tap.Denied()) < 2 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	got := tap.Denied()
	want := []Denied{
		{"a/web", "b/db", "TCP", 80, "deny", "no-rule", "b/db,b/deny", 2, other.Time, other.Time},
		{"a/web", "b/db", "TCP", 5432, "deny", "no-rule", "b/db,b/deny", 1, d.Time, d.Time},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for port := range 2 * maxDenials {
		d.Flow.DstPort = uint16(port)
		tap.put(&d, []byte("x\n"))
	}
	if n := len(tap.Denied()); n != maxDenials {
		t.Errorf("%d kinds are kept", n)
	}
}

// BenchmarkTap is what the log's goroutine pays for the tap, per denial.
func BenchmarkTap(b *testing.B) {
	tap := NewTap()
	rec := denied()
	line := lineOf("n1", rec)
	b.ReportAllocs()
	for b.Loop() {
		tap.put(&rec, line)
	}
}
