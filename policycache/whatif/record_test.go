package whatif

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode"

	"portcullis/policycache/lines"
)

// What is wrong with a line is said with its number, and the rest goes on.
func TestReadBadLines(t *testing.T) {
	good := conn(t, "allow/rule ei 10.0.0.1 10.0.0.2 TCP 80")
	for _, tt := range []struct{ line, want string }{
		{"{", "not JSON"},
		{"[]", "want a JSON object, got array"},
		{`{"verdict":1}`, `field "verdict": a number is out of place`},
		{`{}`, `unknown verdict ""`},
		{strings.Replace(good, "allow", "permit", 1), `unknown verdict "permit"`},
		{strings.Replace(good, `["egress"`, `["outward"`, 1), `unknown direction "outward"`},
		{strings.Replace(good, "TCP", "tcp", 1), `unknown protocol "tcp"`},
		{strings.Replace(good, "TCP", "256", 1), `unknown protocol "256"`},
		{strings.Replace(good, "10.0.0.1", "10.0.0", 1), `src.ip "10.0.0" is not an address`},
		{strings.Replace(good, "10.0.0.2", "pod", 1), `dst.ip "pod" is not an address`},
		{strings.Replace(good, "{", `{"time":"yesterday",`, 1), "is not RFC 3339"},
		{strings.Replace(good, "{", `{"count":-1,`, 1), `field "count"`},
		{strings.Repeat("x", lines.Longest+1), "longer than"},
	} {
		used, complained := 0, ""
		_, err := Read(strings.NewReader(good+"\n\n"+tt.line+"\r\n"+good), func(*Record) { used++ }, func(line int, err error) {
			complained += fmt.Sprintf("%d: %v\n", line, err)
		})
		if err != nil || used != 2 || !strings.HasPrefix(complained, "3: ") || !strings.Contains(complained, tt.want) || strings.Count(complained, "\n") != 1 {
			t.Errorf("%.60s: %v, %d used, complained %q, want %q", tt.line, err, used, complained, tt.want)
		}
	}
}

// TestReadNames: a name that a terminal would obey makes a line no record, wherever it
// stands.
func TestReadNames(t *testing.T) {
	for _, c := range []string{"\\u001b[2J", "a\\nb", "\\u009b0m", "\\u202e", "\\u007f"} {
		for _, field := range []string{`"src":{"ip":"10.0.0.1","pod":"X"}`, `"dst":{"ip":"10.0.0.1","namespace":"X"}`,
			`"egress":{"verdict":"deny","policies":["X"]}`, `"ingress":{"verdict":"allow","allowedBy":{"policy":"X"}}`, `"reason":"X"`} {
			line := `{"verdict":"deny","protocol":"TCP",` + strings.Replace(field, "X", c, 1) + `}`
			var said []string
			_, err := Read(strings.NewReader(line), func(*Record) { t.Errorf("%s was taken", line) }, func(_ int, err error) { said = append(said, err.Error()) })
			if err != nil || len(said) != 1 || !strings.Contains(said[0], "is no name") || strings.ContainsFunc(said[0], func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%s: %v, %q", line, err, said)
			}
		}
	}
}

func TestReadFields(t *testing.T) {
	const line = `{"time":"2026-11-25T10:00:00.5Z","node":"n1","verdict":"would-deny","reason":"no-rule","directions":["ingress"],` +
		`"protocol":"47","src":{"ip":"::ffff:10.0.0.1"},"dst":{"ip":"fd00::1","namespace":"a","pod":"b"},"new":{"field":[1]},"count":7}`
	var got *Record
	_, err := Read(strings.NewReader(line), func(r *Record) { got = r }, func(_ int, err error) { t.Error(err) })
	if err != nil || got == nil {
		t.Fatal(got, err)
	}
	if got.Count != 7 || got.proto != 47 || got.src.String() != "10.0.0.1" || got.allowed() || !got.judged("ingress") || got.judged("egress") || !got.whole() || got.Time.Nanosecond() != 5e8 {
		t.Errorf("%+v", got)
	}
}

func TestReadFails(t *testing.T) {
	broken := errors.New("broken disk")
	used := 0
	_, err := Read(iotest.DataErrReader(iotest.TimeoutReader(strings.NewReader(conn(t, "allow/rule ei 10.0.0.1 10.0.0.2 TCP 80")))), func(*Record) { used++ }, func(_ int, err error) { t.Error(err) })
	if !errors.Is(err, iotest.ErrTimeout) || used != 1 {
		t.Errorf("%v, %d used", err, used)
	}
	if _, err := Read(iotest.ErrReader(broken), nil, nil); !errors.Is(err, broken) || !strings.HasPrefix(err.Error(), "reading the log: ") {
		t.Error(err)
	}
}

// A packet whose ports or type aren't there wasn't whole, whatever became of it.
func TestFlowDefect(t *testing.T) {
	for _, tt := range []struct{ conn, want string }{
		{"allow/rule ei 10.0.0.1 10.0.0.2 TCP 80", "none"},
		{"allow/not-isolated ei 10.0.0.1 10.0.0.2 TCP -", "malformed"},
		{"deny/fragment ei 10.0.0.1 10.0.0.2 UDP -", "fragment"},
		{"deny/truncated ei 10.0.0.1 10.0.0.2 ICMP -", "truncated"},
		{"allow/rule ei 10.0.0.1 10.0.0.2 ICMP 8", "none"},
		{"allow/rule ei 10.0.0.1 10.0.0.2 47 -", "none"},
		{"deny/malformed ei 10.0.0.1 10.0.0.2 47 -", "malformed"},
	} {
		readAll(t, func(r *Record) {
			if f := r.flow(); f.Defect.String() != tt.want {
				t.Errorf("%s: %s, want %s", tt.conn, f.Defect, tt.want)
			}
		}, tt.conn)
	}
}

func TestSpan(t *testing.T) {
	var s span
	if s.add(time.Time{}); s.String() != "at unknown times" {
		t.Error(s.String())
	}
	at := time.Date(2026, 1, 1, 12, 0, 0, 0, time.FixedZone("", 3600))
	if s.add(at); s.String() != "2026-01-01T11:00:00Z" {
		t.Error(s.String())
	}
	s.add(at.Add(-time.Hour))
	s.add(at.Add(time.Hour))
	if s.String() != "2026-01-01T10:00:00Z to 2026-01-01T12:00:00Z" {
		t.Error(s.String())
	}
}

// FuzzRecord reads lines that may be no records: none makes it panic, and what is
// taken has names that can be printed.
func FuzzRecord(f *testing.F) {
	f.Add(`{"time":"2026-11-25T10:00:00.5Z","verdict":"deny","reason":"no-rule","directions":["ingress"],"protocol":"TCP","src":{"ip":"10.0.0.1","port":1},"dst":{"ip":"fd00::1","port":80,"namespace":"a","pod":"b"},"ingress":{"verdict":"deny","isolated":true,"policies":["a/p"],"allowedBy":null}}`)
	f.Add(`{"schema":1,"kind":"missing","suppressed":3,"lost":18446744073709551615}`)
	f.Add("{\"verdict\":\"allow\",\"protocol\":\"256\"}\n[]\n{")
	f.Fuzz(func(t *testing.T, text string) {
		_, err := Read(strings.NewReader(text), func(r *Record) {
			if s, bad := r.unprintable(); bad || r.Count == 0 {
				t.Errorf("%q was taken with %q, %d times", text, s, r.Count)
			}
			_ = r.flow()
			_ = r.whole()
		}, func(line int, err error) {
			if line < 1 || err == nil {
				t.Errorf("%q: line %d, %v", text, line, err)
			}
		})
		if err != nil {
			t.Error(err)
		}
	})
}
