package live

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

const denied = `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:05.5Z","node":"n1","verdict":"deny","reason":"no-rule","directions":["ingress"],"protocol":"TCP",` +
	`"src":{"ip":"10.1.0.2","port":40000,"kind":"pod","namespace":"shop","pod":"web-7d-x1","workload":"Deployment/web"},` +
	`"dst":{"ip":"10.1.0.3","port":5432,"kind":"pod","namespace":"data","pod":"db-0"},` +
	`"ingress":{"verdict":"deny","isolated":true,"policies":["data/db","data/default"],"allowedBy":null},"cached":false,"latencyNs":4200,"count":1}`

const admitted = `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:06Z","node":"n2","verdict":"allow","reason":"rule","directions":["egress"],"protocol":"UDP",` +
	`"src":{"ip":"fd00::2","port":40000,"kind":"pod","namespace":"shop","pod":"web-7d-x1","workload":"Deployment/web"},"dst":{"ip":"2001:db8::1","port":53,"kind":"external"},` +
	`"egress":{"verdict":"allow","isolated":true,"policies":["shop/out"],"allowedBy":{"policy":"shop/out","rule":2}},"cached":true,"latencyNs":900,"count":1}`

const exempt = `{"schema":1,"kind":"decision","time":"2025-01-02T03:04:07Z","node":"n2","verdict":"allow","reason":"own-node","directions":["ingress"],"protocol":"ICMP",` +
	`"src":{"ip":"192.168.0.2","kind":"node","node":"n2"},"dst":{"ip":"10.1.0.3","kind":"pod","namespace":"data","pod":"db-0"},"icmpType":8,"icmpCode":0,` +
	`"ingress":{"verdict":"allow","isolated":true,"policies":["data/db"],"allowedBy":null},"cached":true,"latencyNs":900,"count":1}`

const missing = `{"schema":1,"kind":"missing","time":"2025-01-02T03:04:08Z","node":"n2","suppressed":0,"lost":12}`

func record(t *testing.T, line string) *Record {
	t.Helper()
	r, err := Parse([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestText(t *testing.T) {
	truncated := strings.NewReplacer("no-rule", "truncated", `"verdict":"deny","reason"`, `"verdict":"revoked","reason"`).Replace(denied)
	for _, row := range []struct{ line, want string }{
		{denied, "Jan  2 03:04:05.500  DENY   tcp shop/web-7d-x1 (10.1.0.2) -> data/db-0 (10.1.0.3):5432  data/db-0 is isolated for ingress by policies data/db, data/default; no rule admits this  [n1]"},
		{admitted, "Jan  2 03:04:06.000  ALLOW  udp shop/web-7d-x1 (fd00::2) -> [2001:db8::1]:53  egress rule 2 of shop/out admits this  [n2]"},
		{exempt, "Jan  2 03:04:07.000  ALLOW  icmp node n2 (192.168.0.2) -> data/db-0 (10.1.0.3)  own-node: a node and its own pods always reach each other  [n2]"},
		{missing, "Jan  2 03:04:08.000  MISSING  12 lost, 0 suppressed  [n2]"},
		{truncated, "Jan  2 03:04:05.500  REVOKED  tcp shop/web-7d-x1 (10.1.0.2) -> data/db-0 (10.1.0.3):5432  truncated: data/db-0 is isolated for ingress by policies data/db, data/default  [n1]"},
	} {
		if got := record(t, row.line).Text(false, time.UTC); got != row.want {
			t.Errorf("got  %s\nwant %s", got, row.want)
		}
	}
	for line, want := range map[string]string{denied: "\x1b[1;31mDENY \x1b[0m", strings.Replace(admitted, `"allow"`, `"brandnew"`, 1): "\x1b[1mBRANDNEW\x1b[0m"} {
		if got := record(t, line).Text(true, time.UTC); !strings.Contains(got, want) {
			t.Errorf("%q has no %q", got, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, line := range []string{"", "{", "[]", `{"level":"INFO","msg":"x"}`, `{"kind":"other"}`, `{"kind":"decision","time":"now"}`} {
		if r, err := Parse([]byte(line)); err == nil {
			t.Errorf("%s: %+v", line, r)
		}
	}
}

func TestFilter(t *testing.T) {
	now := time.Date(2025, 1, 2, 3, 4, 10, 0, time.UTC)
	words := func(s ...string) []string { return s }
	for _, row := range []struct {
		name string
		c    Criteria
		want string // which of denied, admitted, exempt, missing
	}{
		{"nothing asked", Criteria{}, "daem"},
		{"a namespace", Criteria{Namespace: words("data")}, "dem"},
		{"one of two", Criteria{Namespace: words("nope", "shop")}, "dam"},
		{"a pod", Criteria{Pod: words("db-0")}, "dem"},
		{"with its namespace", Criteria{Pod: words("data/db-0")}, "dem"},
		{"in another namespace", Criteria{Pod: words("shop/db-0")}, "m"},
		{"a workload", Criteria{Pod: words("shop/web")}, "dam"},
		{"a pattern", Criteria{Pod: words("web-*")}, "dam"},
		{"a pattern of namespaces", Criteria{Pod: words("d*/db-?")}, "dem"},
		{"from a pod", Criteria{From: words("db-0")}, "m"},
		{"to a pod", Criteria{To: words("db-0")}, "dem"},
		{"to an address", Criteria{To: words("2001:db8::1")}, "am"},
		{"from a block", Criteria{From: words("10.0.0.0/8")}, "dm"},
		{"from a node", Criteria{From: words("n2")}, "em"},
		{"a verdict", Criteria{Verdict: words("DENY")}, "dm"},
		{"verdicts", Criteria{Verdict: words("deny", "allow")}, "daem"},
		{"a port", Criteria{Port: words("53")}, "am"},
		{"a policy that isolates", Criteria{Policy: words("data/default")}, "dm"},
		{"without its namespace", Criteria{Policy: words("out")}, "am"},
		{"both ends", Criteria{From: words("web"), To: words("db-0")}, "dm"},
		{"all at once", Criteria{Namespace: words("shop"), Verdict: words("deny"), Port: words("5432", "1"), Policy: words("db")}, "dm"},
		{"since then", Criteria{Since: "2025-01-02T03:04:06Z"}, "aem"},
		{"since some time", Criteria{Since: "3s"}, "em"},
	} {
		f, err := NewFilter(row.c, now)
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		got := ""
		for letter, line := range map[string]string{"d": denied, "a": admitted, "e": exempt, "m": missing} {
			if f.Match(record(t, line)) {
				got += letter
			}
		}
		for _, letter := range "daem" {
			if strings.ContainsRune(got, letter) != strings.ContainsRune(row.want, letter) {
				t.Errorf("%s: got %q, want %q", row.name, got, row.want)
				break
			}
		}
	}
	for want, c := range map[string]Criteria{
		"--port": {Port: words("http")}, "--since": {Since: "yesterday"}, "--from": {From: words("a/b/c")}, "--to": {To: words("")}, "--pod": {Pod: words("a[")},
		"syntax": {Policy: words("[")},
	} {
		if _, err := NewFilter(c, now); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", c, err, want)
		}
	}
}

// TestMerge: records that come within the hold are in the order of their times,
// whatever the order in which they came, and none is lost.
func TestMerge(t *testing.T) {
	start := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	r := rand.New(rand.NewPCG(1, 1))
	m := Merge{Hold: 100 * time.Millisecond}
	now := start
	var got []*Record
	for range 2000 {
		now = now.Add(time.Duration(r.IntN(10)) * time.Millisecond)
		m.Add(&Record{Time: now.Add(-time.Duration(r.IntN(90)) * time.Millisecond)}, now)
		got = append(got, m.Ready(now)...)
	}
	if waits := len(m.waiting); waits == 0 || waits > 200 {
		t.Errorf("%d wait", waits)
	}
	got = append(got, m.Rest()...)
	if len(got) != 2000 || !slices.IsSortedFunc(got, func(a, b *Record) int { return a.Time.Compare(b.Time) }) {
		t.Errorf("%d records, or not in order", len(got))
	}
	var none Merge
	none.Add(&Record{Node: "late"}, now)
	if ready := none.Ready(now); len(ready) != 1 {
		t.Errorf("without a hold: %v", ready)
	}
}

func sample(node string, at int, allow, deny uint64, kinds ...Denied) *Sample {
	start := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	return &Sample{Node: node, Started: start, Time: start.Add(time.Duration(at) * time.Second), Decisions: map[string]uint64{"allow": allow, "deny": deny},
		Latency: []Bucket{{1000, allow}, {2000, deny}, {0, 0}}, Queues: []Queue{{100, 3, 1}, {101, 4, 0}}, Denied: kinds}
}

func kind(from string, count uint64, last int) Denied {
	return Denied{From: from, To: "a/db", Protocol: "TCP", Port: 5432, Verdict: "deny", Reason: "no-rule", Policies: "a/db", Count: count,
		Last: time.Date(2025, 1, 1, 0, 0, last, 0, time.UTC)}
}

func TestTop(t *testing.T) {
	top := NewTop()
	top.Add(sample("n1", 10, 100, 10, kind("a/x", 10, 1)))
	now := time.Date(2025, 1, 1, 0, 0, 12, 0, time.UTC)
	if n := top.Nodes(now)[0]; n.PerSecond != 11 || n.DeniedPerSecond != 1 || n.Median != 1000 || n.P99 != 2000 || n.Waiting != 7 || n.Dropped != 1 || n.Total != 110 {
		t.Errorf("since the start: %+v", n)
	}
	top.Add(sample("n1", 12, 100, 30, kind("a/x", 25, 11), kind("a/y", 5, 12)))
	top.Add(sample("n2", 12, 0, 0, kind("a/y", 21, 3)))
	if n := top.Nodes(now); n[0].PerSecond != 10 || n[0].DeniedPerSecond != 10 || n[0].Median != 2000 || n[1].Median != 0 {
		t.Errorf("between two: %+v", n)
	}
	order := func(sort string) (names string) {
		for _, d := range top.Denied(sort) {
			names += fmt.Sprintf("%s=%d ", d.From, d.Count)
		}
		return names
	}
	for sort, want := range map[string]string{"count": "a/y=26 a/x=25 ", "rate": "a/x=25 a/y=26 ", "last": "a/y=26 a/x=25 ", "from": "a/x=25 a/y=26 "} {
		if got := order(sort); got != want {
			t.Errorf("by %s: %s, want %s", sort, got, want)
		}
	}
	page := top.Page("count", 1, now, time.UTC)
	for _, want := range []string{"NODE", "n1    10.0    10.0      <2µs    <2µs  7        1        130\n", "26     4.2     00:00:12  a/y   a/db  5432/TCP  a/db\nand 1 more\n"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q in\n%s", want, page)
		}
	}
	// A new agent in the old one's place counts from zero.
	anew := sample("n1", 14, 4, 0)
	anew.Started = now
	top.Add(anew)
	if n := top.Nodes(now)[0]; n.PerSecond != 2 || n.Total != 4 {
		t.Errorf("a new agent: %+v", n)
	}
	top.Forget(now.Add(time.Second))
	if n := top.Nodes(now); len(n) != 1 || n[0].Node != "n1" {
		t.Errorf("forgotten: %+v", n)
	}
}
