package explain

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"portcullis/policycache/lines"
)

func batch(t testing.TB, c *Cluster, in string) (lines []string, bad int) {
	t.Helper()
	var out bytes.Buffer
	bad, err := c.Batch(strings.NewReader(in), &out)
	if err != nil {
		t.Fatal(err)
	}
	if out.Len() == 0 {
		return nil, bad
	}
	return strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n"), bad
}

const (
	openSide = `{"verdict":"allow","isolated":false,"policies":[],"allowedBy":null}`
	dbDenies = `{"verdict":"deny","isolated":true,"policies":["shop/db","shop/deny"],"allowedBy":null}`
	dbAllows = `{"verdict":"allow","isolated":true,"policies":["shop/db","shop/deny"],"allowedBy":{"policy":"shop/db","rule":%d}}`
)

// answered is the line that answers a question.
func answered(question, verdict, egress, ingress, reason string) string {
	return strings.TrimSuffix(question, "}") + fmt.Sprintf(`,"verdict":"%s","egress":%s,"ingress":%s,"reason":"%s"}`, verdict, egress, ingress, reason)
}

func TestBatchAnswers(t *testing.T) {
	c := testCluster(t)
	rule := func(n int) string { return fmt.Sprintf(dbAllows, n) }
	for _, tt := range []struct{ in, want string }{
		{`{"from":"default/web","to":"shop/db","protocol":"TCP","port":5432}`, answered(`{"from":"default/web","to":"shop/db","protocol":"TCP","port":5432}`, "deny", openSide, dbDenies, "no-rule")},
		{`{"from":"shop/api","to":"shop/db","port":5432}`, answered(`{"from":"shop/api","to":"shop/db","protocol":"TCP","port":5432}`, "allow", openSide, rule(0), "rule")},
		{`{"port":"postgres","protocol":null,"to":"shop/db","from":"shop/api"}`, answered(`{"from":"shop/api","to":"shop/db","protocol":"TCP","port":"postgres"}`, "allow", openSide, rule(0), "rule")},
		{`{"from":"203.0.113.9","to":"10.0.0.2","protocol":"tcp","port":"5432"}`, answered(`{"from":"203.0.113.9","to":"10.0.0.2","protocol":"tcp","port":"5432"}`, "allow", openSide, rule(1), "rule")},
		{`{"from":"web","to":"203.0.113.9","protocol":"ICMP"}`, answered(`{"from":"web","to":"203.0.113.9","protocol":"ICMP"}`, "allow", openSide, openSide, "not-isolated")},
		{`{"from":"web","to":"shop/api","protocol":"ICMP","port":0}`, answered(`{"from":"web","to":"shop/api","protocol":"ICMP","port":0}`, "allow", openSide, openSide, "not-isolated")},
		{` {"from":"web" , "to":"shop/api","protocol":"ICMP","port":null} `, answered(`{"from":"web","to":"shop/api","protocol":"ICMP"}`, "allow", openSide, openSide, "not-isolated")},
	} {
		lines, bad := batch(t, c, tt.in+"\n")
		if bad != 0 || len(lines) != 1 || lines[0] != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.in, lines, tt.want)
		}
	}
}

func TestBatchErrors(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ in, want string }{
		{`{`, "not JSON"},
		{`{"from":"web","to":"shop/db","port":1} x`, "not JSON"},
		{`web shop/db 80`, "not JSON"},
		{`[]`, "want a JSON object, got array"},
		{`null`, `"from" is missing`},
		{`{}`, `"from" is missing`},
		{`{"from":"web"}`, `"to" is missing`},
		{`{"from":"web","to":"shop/db","port":1,"prot":"TCP"}`, `unknown field "prot"`},
		{`{"From":"web","to":"shop/db","port":1}`, `unknown field "From"`},
		{`{"from":"web","from":"web","to":"shop/db","port":1}`, `duplicate field "from"`},
		{`{"from":1,"to":"shop/db","port":1}`, `field "from" must be a string, got number`},
		{`{"from":"web","to":["a"],"port":1}`, `field "to" must be a string, got array`},
		{`{"from":"web","to":"shop/db"}`, "TCP needs a port"},
		{`{"from":"web","to":"shop/db","port":0}`, `bad port "0"`},
		{`{"from":"web","to":"shop/db","port":65536}`, `bad port "65536"`},
		{`{"from":"web","to":"shop/db","port":-1}`, `bad port "-1"`},
		{`{"from":"web","to":"shop/db","port":80.5}`, `bad port "80.5"`},
		{`{"from":"web","to":"shop/db","port":8e1}`, `bad port "8e1"`},
		{`{"from":"web","to":"shop/db","port":true}`, `bad port "true"`},
		{`{"from":"web","to":"shop/db","port":{}}`, `bad port "{}"`},
		{`{"from":"web","to":"shop/db","port":""}`, "TCP needs a port"},
		{`{"from":"web","to":"shop/db","port":"http"}`, `no TCP port named "http"`},
		{`{"from":"web","to":"shop/db","port":1,"protocol":"GRE"}`, `unknown protocol "GRE"`},
		{`{"from":"web","to":"shop/nobody","port":1}`, `to: there is no pod "shop/nobody"`},
		{`{"from":"10.0.0.1","to":"fd00::2","port":1}`, "no IP family in common"},
	} {
		lines, bad := batch(t, c, "\n"+tt.in)
		if bad != 1 || len(lines) != 1 {
			t.Errorf("%s: %d bad, got %s", tt.in, bad, lines)
			continue
		}
		var got errorLine
		if err := json.Unmarshal([]byte(lines[0]), &got); err != nil {
			t.Errorf("%s: %v", tt.in, err)
		}
		if got.Line != 2 || !strings.Contains(got.Error, tt.want) {
			t.Errorf("%s: got %s, want %q", tt.in, lines[0], tt.want)
		}
	}
}

// Blank lines are counted, a bad line does not stop the others, the last line
// needs no newline, and lines may end in CRLF.
func TestBatchLines(t *testing.T) {
	c := testCluster(t)
	const good = `{"from":"web","to":"shop/api","port":80}`
	long := `{"from":"` + strings.Repeat("x", lines.Longest) + `"}`
	almost := `{"from":"web","to":"shop/api","port":80` + strings.Repeat(" ", lines.Longest-60) + `}`
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"blank", "\n \n\t\r\n", ""},
		{"no newline", good, "ok"},
		{"CRLF", good + "\r\n" + good + "\r\n", "ok ok"},
		{"bad between", good + "\nx\n\n" + good + "\ny", "ok 2 ok 5"},
		{"long", good + "\n" + long + "\n" + good, "ok 2 ok"},
		{"long at the end", good + "\n" + long, "ok 2"},
		{"two long", long + "\n" + long + "\n", "1 2"},
		{"almost too long", almost + "\n" + good, "ok ok"},
		{"zero byte", "\x00\n" + good, "1 ok"},
	} {
		lines, _ := batch(t, c, tt.in)
		var got []string
		for _, l := range lines {
			var e errorLine
			if err := json.Unmarshal([]byte(l), &e); err != nil {
				t.Errorf("%s: %s: %v", tt.name, l, err)
			}
			if e.Line == 0 {
				got = append(got, "ok")
			} else {
				got = append(got, fmt.Sprint(e.Line))
			}
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: got %v, want %s", tt.name, got, tt.want)
		}
	}
}

func TestBatchKeepsOrder(t *testing.T) {
	c := testCluster(t)
	var in strings.Builder
	const count = 5000
	for i := range count {
		fmt.Fprintf(&in, `{"from":"web","to":"shop/db","port":%d}`+"\n", i+1)
	}
	lines, bad := batch(t, c, in.String())
	if len(lines) != count || bad != 0 {
		t.Fatalf("%d lines, %d bad", len(lines), bad)
	}
	for i, l := range lines {
		if !strings.Contains(l, fmt.Sprintf(`"port":%d,`, i+1)) {
			t.Fatalf("line %d is %s", i+1, l)
		}
	}
}

// What was answered before the input failed is written all the same.
func TestBatchReadError(t *testing.T) {
	c := testCluster(t)
	failure := errors.New("disk on fire")
	in := io.MultiReader(strings.NewReader(`{"from":"web","to":"shop/api","port":80}`+"\n"), iotest.ErrReader(failure))
	var out bytes.Buffer
	_, err := c.Batch(in, &out)
	if !errors.Is(err, failure) || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("error %v, output %q", err, out.String())
	}
}

func TestBatchWriteError(t *testing.T) {
	c := testCluster(t)
	r, w := io.Pipe()
	r.Close()
	in := strings.Repeat(`{"from":"web","to":"shop/api","port":80}`+"\n", 2000)
	if _, err := c.Batch(strings.NewReader(in), w); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("error %v, want the closed pipe's", err)
	}
}

// A program may ask through a pipe and wait for the answer before it asks on.
func TestBatchAnswersAtOnce(t *testing.T) {
	c := testCluster(t)
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error)
	go func() {
		_, err := c.Batch(inR, outW)
		outW.Close()
		done <- err
	}()
	answers := bufio.NewReader(outR)
	for i := range 3 {
		fmt.Fprintf(inW, `{"from":"web","to":"shop/api","port":%d}`+"\n{", i+1)
		line, err := answers.ReadString('\n')
		if err != nil || !strings.Contains(line, fmt.Sprintf(`"port":%d`, i+1)) {
			t.Errorf("answer %d: %q, %v", i, line, err)
		}
		fmt.Fprint(inW, "}\n")
		if line, err := answers.ReadString('\n'); err != nil || !strings.Contains(line, "error") {
			t.Errorf("answer %d: %q, %v", i, line, err)
		}
	}
	inW.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// An answer costs a fixed, small number of allocations, most of them JSON's.
func TestBatchAllocations(t *testing.T) {
	c := testCluster(t)
	line := []byte(`{"from":"shop/api","to":"shop/db","protocol":"TCP","port":5432}`)
	allocs := testing.AllocsPerRun(200, func() {
		if _, err := c.answer(line); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 40 {
		t.Errorf("%v allocations for a line", allocs)
	}
}

// Whatever a line holds, it yields exactly one line of JSON, an answer or an
// error with its number; a blank one yields none.
func FuzzBatchLine(f *testing.F) {
	c := testCluster(f)
	f.Add([]byte(`{"from":"shop/api","to":"shop/db","protocol":"TCP","port":5432}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		line = bytes.ReplaceAll(line, []byte("\n"), []byte(" "))
		var out bytes.Buffer
		bad, err := c.Batch(bytes.NewReader(line), &out)
		if err != nil {
			t.Fatal(err)
		}
		if len(bytes.TrimSpace(line)) == 0 {
			if out.Len() != 0 {
				t.Fatalf("blank line yields %q", out.Bytes())
			}
			return
		}
		if bytes.Count(out.Bytes(), []byte("\n")) != 1 {
			t.Fatalf("not one line: %q", out.Bytes())
		}
		var got struct {
			Line     int
			Error    string
			Verdict  string
			From, To string
			Egress   *sideLine
			Ingress  *sideLine
			Reason   string
			Protocol string
			Port     any
		}
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("%q: %v", out.Bytes(), err)
		}
		isError := got.Line == 1 && got.Error != "" && got.Verdict == "" && bad == 1
		isAnswer := got.Line == 0 && got.Error == "" && (got.Verdict == "allow" || got.Verdict == "deny") &&
			got.Egress != nil && got.Ingress != nil && got.Egress.Policies != nil && got.Ingress.Policies != nil && bad == 0
		if isError == isAnswer {
			t.Fatalf("neither answer nor error: %q", out.Bytes())
		}
	})
}

func BenchmarkBatch(b *testing.B) {
	c := testCluster(b)
	in := bytes.Repeat([]byte(`{"from":"shop/api","to":"shop/db","protocol":"TCP","port":5432}`+"\n"), 100_000)
	b.ReportAllocs()
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		if bad, err := c.Batch(bytes.NewReader(in), io.Discard); err != nil || bad != 0 {
			b.Fatal(bad, err)
		}
	}
}
