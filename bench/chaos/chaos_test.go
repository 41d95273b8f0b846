package chaos

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// mute takes a test's failures instead of failing.
type mute struct {
	testing.TB
	failed int
}

func (m *mute) Helper()               {}
func (m *mute) Logf(string, ...any)   {}
func (m *mute) Errorf(string, ...any) { m.failed++ }

func TestReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rows")
	t.Setenv(RowsEnv, path)
	m := &mute{TB: t}
	for _, r := range []Row{
		{Fault: "kill -9", Load: "100/s", Tried: 7, Lost: Unknown},
		{Fault: "a flood", Load: "100/s", Tried: 9, Note: "p99 1 ms"},
	} {
		Report(m, r)
	}
	if m.failed != 0 {
		t.Errorf("good rows failed %d times", m.failed)
	}
	Report(m, Row{Fault: "zero tried, and wrong, and lost", Wrong: 1, Lost: 1})
	if m.failed != 3 {
		t.Errorf("%d complaints about a row with three faults", m.failed)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := Read(f)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := Write(&b, rows); err != nil {
		t.Fatal(err)
	}
	want := `
FAULT                            LOAD HELD  TRIED  WRONG  LOST  NOTE
a flood                          100/s      9      0      0     p99 1 ms
kill -9                          100/s      7      0      -
zero tried, and wrong, and lost             0      1      1
`
	var got []string
	for l := range strings.Lines(b.String()) {
		got = append(got, strings.TrimRight(l, " \n"))
	}
	if text := "\n" + strings.Join(got, "\n") + "\n"; text != want {
		t.Errorf("table is%s\nwant%s", text, want)
	}
}

func TestReadGarbage(t *testing.T) {
	if _, err := Read(strings.NewReader("{\"Fault\":\"x\"}\n{nonsense")); err == nil {
		t.Error("half a row is no error")
	}
}
