package audit

import (
	"bytes"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"portcullis/verdict"
)

const schemaPath = "../../deploy/decision-log.schema.json"

func schema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	s, err := c.Compile(schemaPath)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func valid(s *jsonschema.Schema, line string) error {
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(line))
	if err != nil {
		return err
	}
	return s.Validate(v)
}

// snapshot has a pod with all that the log tells of one, isolated both ways, and
// a node, and knows its policy's version.
func snapshot() (*verdict.Snapshot, *verdict.Endpoint) {
	prefix := netip.MustParsePrefix
	table := verdict.NewTable([]verdict.Policy{{Name: "b/db", Rules: []verdict.Rule{{AnyPort: true, Blocks: []verdict.Block{
		{CIDR: prefix("192.0.2.0/24"), Except: []netip.Prefix{prefix("192.0.2.128/25")}}, {CIDR: prefix("2001:db8::/32")}}}}}}, nil, nil)
	db := &verdict.Endpoint{Namespace: "b", Name: "db-0", Node: "n1", Judged: true, Ingress: table, Egress: table,
		Labels: map[string]string{"app": "db", "a\"quote": "x\n"}, Workload: "StatefulSet/db"}
	return verdict.NewSnapshot(verdict.Input{
		Generation: 7,
		Owners:     map[netip.Addr]*verdict.Endpoint{addr("10.1.0.3"): db, addr("fd00::3"): db},
		Nodes:      map[netip.Addr][]string{addr("10.0.0.2"): {"n2"}},
		Versions:   map[string]string{"b/db": "4711"},
	}, nil), db
}

// decide makes the record of a flow as a worker would.
func decide(s *verdict.Snapshot, src, dst string, proto verdict.Protocol) Record {
	f := verdict.Flow{Src: addr(src), Dst: addr(dst), Proto: proto}
	if proto.HasPorts() {
		f.SrcPort, f.DstPort = 40000, 80
	}
	return Record{Time: time.Date(2025, 1, 2, 3, 4, 5, 6, time.UTC).UnixNano(), Latency: 1, Flow: f, Decision: s.Decide(&f), Snapshot: s}
}

// TestLineTellsTheSnapshot holds what only a snapshot knows: nodes, externals,
// the block by which a rule admits, labels, workload, versions, generation.
func TestLineTellsTheSnapshot(t *testing.T) {
	schema, s := schema(t), func() *verdict.Snapshot { s, _ := snapshot(); return s }()
	const pod = `"kind":"pod","namespace":"b","pod":"db-0","workload":"StatefulSet/db","labels":{"a\"quote":"x\n","app":"db"}}`
	for _, c := range []struct {
		src, dst string
		proto    verdict.Protocol
		want     []string
	}{
		{"192.0.2.1", "10.1.0.3", verdict.TCP, []string{`"src":{"ip":"192.0.2.1","port":40000,"kind":"external"}`, pod, `"policies":["b/db"],"policyVersions":{"b/db":"4711"}`,
			`"allowedBy":{"policy":"b/db","rule":0,"ipBlock":"192.0.2.0/24"}`, `"generation":7,"count":1}`}},
		{"fd00::3", "2001:db8::1", verdict.ICMPv6, []string{`"dst":{"ip":"2001:db8::1","kind":"external"}`, `"icmpType":0`, `"egress":{"verdict":"allow"`, `"ipBlock":"2001:db8::/32"`}},
		{"192.0.2.129", "10.1.0.3", verdict.UDP, []string{`"reason":"no-rule"`, `"allowedBy":null`}},
		{"10.0.0.2", "10.1.0.3", verdict.SCTP, []string{`"src":{"ip":"10.0.0.2","port":40000,"kind":"node","node":"n2"}`}},
		{"10.1.0.3", "10.1.0.3", 47, []string{`"reason":"self"`, `"protocol":"47"`}},
	} {
		rec := decide(s, c.src, c.dst, c.proto)
		rec.refresh()
		line := string(appendTally(appendRecord(nil, "n1", true, &rec), tally{count: 1}))
		for _, want := range c.want {
			if !strings.Contains(line, want) {
				t.Errorf("%s to %s: no %s in %s", c.src, c.dst, want, line)
			}
		}
		if err := valid(schema, line); err != nil {
			t.Errorf("%v: %s", err, line)
		}
	}
}

// TestSchema validates a line of every sort, and refuses what isn't one.
func TestSchema(t *testing.T) {
	schema := schema(t)
	truncated := denied()
	truncated.Flow = verdict.Flow{Proto: verdict.TCP, Defect: verdict.ReasonTruncated}
	truncated.Decision = verdict.Decision{Reason: verdict.ReasonTruncated}
	x, y := denied(), allowed()
	cut := denied()
	cut.Revoked, cut.Latency = true, 0
	lines := []string{string(lineOf("n1", x)), string(lineOf("n1", y)), string(lineOf("n1", truncated)), string(lineOf("", x)),
		string(appendTally(appendRecord(nil, "n1", true, &x), tally{count: 3, last: x.Time + 1})),
		string(appendTally(appendRecord(nil, "n1", true, &y), tally{count: 1, sample: 10})),
		string(appendMissing(nil, "n1", time.Now(), missing{suppressed: 1})), string(lineOf("n1", cut))}
	for _, line := range lines {
		if err := valid(schema, line); err != nil {
			t.Errorf("%v: %s", err, line)
		}
	}
	for _, change := range [][2]string{{`"latencyNs":0`, `"latencyNs":1`}, {`"count":1`, `"count":2,"lastTime":"2025-01-02T03:04:05Z"`}, {`"reason":"no-rule"`, `"reason":"rule"`}} {
		line := strings.Replace(lines[7], change[0], change[1], 1)
		if line == lines[7] || !strings.Contains(line, `"verdict":"revoked"`) || valid(schema, line) == nil {
			t.Errorf("%s for %s is let pass: %s", change[1], change[0], line)
		}
	}
	for _, change := range [][2]string{
		{`"schema":1`, `"schema":2`}, {`"kind":"decision"`, `"kind":"missing"`}, {`"reason":"no-rule"`, `"reason":"because"`},
		{`"reason":"no-rule"`, `"reason":"rule"`}, {`"count":1`, `"count":0`}, {`"count":1`, `"count":2`}, {`"count":1`, `"count":1,"more":1`},
		{`"directions":["ingress"]`, `"directions":[]`}, {`.000000678Z`, `.000000678+01:00`}, {`"time":"2025-`, `"time":"25-`},
		{`"ip":"10.1.0.2"`, `"ip":"10.1.0.256"`}, {`"kind":"pod","namespace":"a"`, `"kind":"external","namespace":"a"`}, {`"isolated":true`, `"isolated":false`},
		{`,"node":"n1"`, ``},
	} {
		if line := strings.Replace(lines[0], change[0], change[1], 1); line == lines[0] || valid(schema, line) == nil {
			t.Errorf("%s for %s is let pass: %s", change[1], change[0], line)
		}
	}
}

// TestSchemaReasons holds the schema's list of reasons and the program's to each
// other.
func TestSchemaReasons(t *testing.T) {
	text, err := os.ReadFile(schemaPath)
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"$defs", "decision", "properties", "reason", "enum"} {
		if v = v.(map[string]any)[key]; v == nil {
			t.Fatalf("the schema has no %s", key)
		}
	}
	var listed, known []string
	for _, word := range v.([]any) {
		listed = append(listed, word.(string))
	}
	for _, r := range verdict.Reasons() {
		if r != verdict.ReasonNone {
			known = append(known, r.String())
		}
	}
	if !slices.Equal(listed, known) {
		t.Errorf("the schema lists %q, the program has %q", listed, known)
	}
}

// TestRefresh: a cached decision names its ends as the snapshot of then; what the
// log says of them is of now.
func TestRefresh(t *testing.T) {
	s, db := snapshot()
	rec := decide(s, "192.0.2.1", "10.1.0.3", verdict.TCP)
	rec.Decision.Dst = &verdict.Endpoint{Namespace: "b", Name: "db-0"}
	if rec.refresh(); rec.Decision.Dst != db || rec.Decision.Src != nil {
		t.Errorf("%+v", rec.Decision.Dst)
	}
	rec.Snapshot, rec.Decision.Dst = nil, nil
	if rec.refresh(); rec.Decision.Dst != nil {
		t.Error("an end out of nothing")
	}
}
