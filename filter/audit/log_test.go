package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"portcullis/verdict"
)

// newTestLog is a log of everything with one sink and no windows.
func newTestLog(w io.Writer, ringSize int) *Log {
	return NewLog(Config{Node: "n1", Sinks: []Sink{{"test", w}}, RingSize: ringSize})
}

// sinkOf gives the counts of a log's only sink.
func sinkOf(l *Log) SinkStats { return l.Stats().Sinks[0] }

func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := newTestLog(&out, 16)
		a, b := l.NewRing(), l.NewRing()
		x, y := denied(), allowed()
		a.Put(&x)
		b.Put(&y)
		time.Sleep(pollEvery + time.Millisecond)
		synctest.Wait()
		if sinkOf(l).Written != 2 {
			t.Errorf("%d written after a poll", sinkOf(l).Written)
		}
		a.Put(&y)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		want := string(lineOf("n1", x)) + string(lineOf("n1", y)) + string(lineOf("n1", y))
		if out.String() != want || sinkOf(l).Written != 3 || sinkOf(l).Lost != 0 || sinkOf(l).Failures != 0 {
			t.Errorf("%d written, %d lost:\n%s", sinkOf(l).Written, sinkOf(l).Lost, out.String())
		}
		if err := l.Close(); err != nil {
			t.Errorf("closed twice: %v", err)
		}
	})
}

// A slow ring gives up so many records a second, and what doesn't fit is counted; the
// other rings don't wait for it, and the end of the log empties it.
func TestLogSlowRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLog(io.Discard, 1024)
		slow, other := l.NewSlowRing(1000), l.NewRing()
		rec := allowed()
		for range 2000 {
			slow.Put(&rec)
			other.Put(&rec)
			time.Sleep(100 * time.Microsecond) // 10,000 a second
		}
		time.Sleep(time.Second / 10)
		synctest.Wait()
		// 0.3 seconds have passed, in which the other's 2,000 were all written.
		if got := sinkOf(l).Written; got < 2290 || got > 2310 {
			t.Errorf("%d written", got)
		}
		if got := slow.Lost(); got < 700 || got > 800 || other.Lost() != 0 {
			t.Errorf("%d and %d lost", got, other.Lost())
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if got := sinkOf(l); got.Written+got.Lost != 4000 || got.Written < 3200 {
			t.Errorf("at the end %d written, %d lost", got.Written, got.Lost)
		}
	})
}

func TestLogOff(t *testing.T) {
	l := NewLog(Config{Node: "n1"})
	r, rec := l.NewRing(), denied()
	if !r.Put(&rec) || !l.NewSlowRing(1).Put(&rec) || len(l.Stats().Sinks) != 0 || l.Close() != nil {
		t.Error("a log that is off does something")
	}
}

// Workers and the log at once, for the race detector: nothing vanishes.
func TestLogConcurrent(t *testing.T) {
	pr, pw := io.Pipe()
	l := newTestLog(pw, 256)
	var lines uint64
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(pr); s.Scan(); {
			if strings.Contains(s.Text(), `"kind":"decision"`) {
				lines++
			}
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
	if lines != sinkOf(l).Written || sinkOf(l).Written+sinkOf(l).Lost != 6000 || lines == 0 {
		t.Errorf("%d lines, %d written, %d lost", lines, sinkOf(l).Written, sinkOf(l).Lost)
	}
}

// stuck is a writer that never returns until it is let go.
type stuck chan struct{}

func (s stuck) Write(b []byte) (int, error) { <-s; return len(b), nil }

// A writer that blocks costs records, never the worker's time.
func TestLogBlockedWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := make(stuck)
		l := newTestLog(w, 4)
		r, rec := l.NewRing(), denied()
		r.Put(&rec)
		time.Sleep(2 * pollEvery)
		begin := time.Now()
		for range 100 {
			r.Put(&rec)
		}
		if time.Since(begin) != 0 || sinkOf(l).Lost != 96 {
			t.Errorf("puts took %s, %d lost", time.Since(begin), sinkOf(l).Lost)
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
			l := newTestLog(w, 16)
			r, rec := l.NewRing(), denied()
			for range 4 {
				r.Put(&rec)
				time.Sleep(2 * pollEvery)
			}
			l.Close()
			good := uint64(0)
			for line := range strings.Lines(w.String()) {
				if json.Valid([]byte(line)) && strings.Contains(line, `"kind":"decision"`) {
					good++
				}
			}
			if good < 2 || good != sinkOf(l).Written || sinkOf(l).Written+sinkOf(l).Lost != 4 || sinkOf(l).Failures == 0 {
				t.Errorf("%d bytes taken: %d good lines, %d written, %d lost, %d failures", take, good, sinkOf(l).Written, sinkOf(l).Lost, sinkOf(l).Failures)
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
		l := newTestLog(w, 16)
		r, rec := l.NewRing(), denied()
		for range 3 {
			r.Put(&rec)
			time.Sleep(2 * pollEvery)
		}
		l.Close()
		lines := strings.Split(w.String(), "\n")
		if sinkOf(l).Written != 1 || sinkOf(l).Lost != 2 || len(lines) != 4 || !json.Valid([]byte(lines[1])) || !strings.HasSuffix(lines[2], `"suppressed":0,"lost":2}`) {
			t.Errorf("%d written, %d lost, lines %q", sinkOf(l).Written, sinkOf(l).Lost, lines)
		}
	})
}

// TestRevokedIsToldAtOnce: a revoked connection is a record of its own, whatever
// window is open for denials of the same flow.
func TestRevokedIsToldAtOnce(t *testing.T) {
	var out bytes.Buffer
	l := NewLog(Config{Node: "n1", Sinks: []Sink{{"test", &out}}, Window: time.Hour, Audit: verdict.AuditDenied})
	ring := l.NewRing()
	cut, held := denied(), denied()
	cut.Revoked = true
	for range 2 {
		ring.Put(&cut)
		ring.Put(&held)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(out.String(), "\n")
	if len(lines) != 4 || !strings.Contains(lines[0], `"revoked"`) || !strings.Contains(lines[1], `"revoked"`) || !strings.Contains(lines[2], `"deny"`) {
		t.Errorf("the log: %s", out.String())
	}
}
