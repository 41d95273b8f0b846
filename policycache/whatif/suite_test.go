package whatif

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"strings"
	"testing"

	"portcullis/policycache"
)

const suiteHead = "apiVersion: portcullis.dev/v1\nkind: PolicyTest\n"

func TestParseSuite(t *testing.T) {
	s, errs := ParseSuite([]byte("# remark\n---\napiVersion: v1\nkind: Pod\n---\n" + suiteHead + `manifests: [a, b]
namespace: shop
tests:
- {from: a, to: b, port: http, verdict: allow, policy: p, rule: 2}
- name: named
  from: x/a
  to: 10.0.0.1
  protocol: icmp
  verdict: deny
  policy: n/p
`))
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	got := fmt.Sprintf("%v %s", s.Manifests, s.Namespace)
	for _, x := range s.Tests {
		rule := "-"
		if x.Rule != nil {
			rule = fmt.Sprint(*x.Rule)
		}
		got += fmt.Sprintf("\n%d|%s|%s|%s|%s|%s|%s|%s|%s", x.Line, x.Name, x.From, x.To, x.Protocol, x.Port, x.Verdict, x.Policy, rule)
	}
	want := "[a b] shop\n11|a to b, TCP http|a|b|TCP|http|allow|shop/p|2\n12|named|x/a|10.0.0.1|ICMP||deny|n/p|-"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Each mistake is a line with its number, and the tests that are right stay.
func TestParseSuiteErrors(t *testing.T) {
	const good = "- {from: a, to: b, port: 1, verdict: deny}\n"
	for _, tt := range []struct {
		text  string
		tests int // -1 for no suite
		want  string
	}{
		{"", -1, "line 1: no document is of kind PolicyTest"},
		{"- a\n", -1, "line 1: no document is of kind PolicyTest"},
		{"a: [\n", -1, "line 1: did not find expected node content"},
		{"kind: PolicyTest\ntests:\n" + good, -1, "line 1: apiVersion of a PolicyTest must be portcullis.dev/v1"},
		{suiteHead, 0, "line 1: there are no tests"},
		{suiteHead + "test: []\ntests:\n" + good, 1, `line 3: unknown field "test"`},
		{suiteHead + "manifests: {a: b}\ntests:\n" + good, 1, "line 3: cannot unmarshal"},
		{suiteHead + "tests: 5\n", -1, "line 3: cannot unmarshal"},
		{suiteHead + "tests:\n" + good + "- 5\n", 1, "line 5: cannot unmarshal"},
		{suiteHead + "tests:\n" + good + "- {from: a, tu: b}\n", 1, `line 5: unknown field "tu"`},
		{suiteHead + "tests:\n" + good + "- {from: a}\n" + good, 2, "line 5: a test needs from and to"},
		{suiteHead + "tests:\n- {from: a, to: b, verdict: drop}\n" + good, 1, `line 4: verdict must be allow, deny or would-deny, not "drop"`},
		{suiteHead + "tests:\n- {from: a, to: b, verdict: allow, rule: 1}\n" + good, 1, "line 4: a rule needs the policy"},
		{suiteHead + "tests:\n- {from: a, to: b, verdict: deny, policy: p, rule: 1}\n" + good, 1, "line 4: no rule denies"},
		{suiteHead + "tests:\n- {from: a, to: b, verdict: allow, policy: p, rule: x}\n" + good, 1, "line 4: cannot unmarshal"},
		{suiteHead + "tests:\n" + good + "---\n" + suiteHead + "tests:\n" + good, 1, "line 6: a file holds one PolicyTest"},
	} {
		s, errs := ParseSuite([]byte(tt.text))
		tests := -1
		if s != nil {
			tests = len(s.Tests)
		}
		if tests != tt.tests || len(errs) != 1 || !strings.HasPrefix(errs[0].Error(), tt.want) || strings.Contains(errs[0].Error(), "\n") {
			t.Errorf("%q: %d tests, %v, want %d and %q", tt.text, tests, errs, tt.tests, tt.want)
		}
	}
}

// tested has an end that is judged otherwise over IPv6, and one policy more
// than decides.
const tested = `
pod default/a 10.0.0.1,fd00::1 app=a
pod default/b - app=b
pod default/c 10.0.0.3,fd00::3 app=c
policy default/b {podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}]}, {ports: [{port: 81}]}]}
policy default/c {podSelector: {matchLabels: {app: c}}, ingress: [{from: [{ipBlock: {cidr: fd00::/64}}]}]}
policy default/out {podSelector: {matchLabels: {app: b}}, policyTypes: [Egress]}
`

func TestRunSuite(t *testing.T) {
	state := NewState(world(t, tested), "")
	for _, tt := range []struct{ test, want string }{
		{"{from: a, to: b, port: 80, verdict: allow}", ""},
		{"{from: a, to: b, port: 80, verdict: allow, policy: b, rule: 0}", ""},
		{"{from: a, to: b, port: 80, verdict: allow, policy: b, rule: 1}", "want allow by rule 1 of default/b, got allow (rule): ingress rule 0 of default/b"},
		{"{from: a, to: b, port: 80, verdict: allow, policy: c}", "want allow by default/c, got allow (rule): ingress rule 0 of default/b"},
		{"{from: a, to: b, port: 80, verdict: deny}", "want deny, got allow (rule): ingress rule 0 of default/b"},
		{"{from: a, to: b, port: 82, verdict: deny, policy: b}", ""},
		{"{from: b, to: a, port: 82, verdict: deny, policy: out}", ""},
		{"{from: b, to: a, port: 82, verdict: deny, policy: b}", "want deny by default/b, got deny (no-rule): egress isolated by default/out"},
		{"{from: c, to: a, port: 82, verdict: allow, policy: b}", "want allow by default/b, got allow (not-isolated)"},
		{"{from: a, to: c, port: 80, verdict: allow}", "10.0.0.1 to 10.0.0.3: want allow, got deny (no-rule): ingress isolated by default/c"},
		{"{from: a, to: c, port: 80, verdict: deny}", "fd00::1 to fd00::3: want deny, got allow (rule): ingress rule 0 of default/c"},
		{"{from: a, to: 10.0.0.3, port: 80, verdict: deny}", ""},
		{"{from: a, to: d, port: 80, verdict: deny}", `to: there is no pod "default/d"; did you mean default/a or default/b or default/c?`},
		{"{from: a, to: b, port: http, verdict: deny}", `pod default/b has no TCP port named "http": its ports have no names`},
		{"{from: a, to: b, verdict: deny, protocol: icmp}", ""},
		{"{from: a, to: b, port: 82, verdict: would-deny}", "want would-deny, got deny (no-rule): ingress isolated by default/b"},
	} {
		s, errs := ParseSuite([]byte(suiteHead + "tests: [" + tt.test + "]\n"))
		if len(errs) > 0 {
			t.Fatal(tt.test, errs)
		}
		r := s.Run("f", state, NewCoverage())
		if got := r.Tests[0].Failure; got != tt.want || r.Tests[0].Pass != (tt.want == "") || (r.Failed == 0) != (tt.want == "") {
			t.Errorf("%s: got %q, want %q", tt.test, got, tt.want)
		}
	}
}

func TestCoverage(t *testing.T) {
	state, c := NewState(world(t, tested), ""), NewCoverage()
	report := func() string {
		r := c.Report()
		words := []string{fmt.Sprintf("%d/%d %.0f%%", r.Exercised, r.Rules, r.Percent)}
		for _, m := range r.Missing {
			words = append(words, m.String())
		}
		return strings.Join(words, "; ")
	}
	if got := report(); got != "0/0 100%" {
		t.Error(got)
	}
	for _, tt := range []struct{ test, want string }{
		{"from: a, to: b, port: 90", "0/4 0%; ingress rule 0 of default/b; ingress rule 1 of default/b; ingress rule 0 of default/c; egress of default/out, which has no rules"},
		{"from: a, to: b, port: 80", "1/4 25%; ingress rule 1 of default/b; ingress rule 0 of default/c; egress of default/out, which has no rules"},
		{"from: b, to: a, port: 80", "2/4 50%; ingress rule 1 of default/b; ingress rule 0 of default/c"},
		{"from: c, to: b, port: 81", "3/4 75%; ingress rule 0 of default/c"},
		{"from: a, to: c, port: 81", "4/4 100%"},
	} {
		s, errs := ParseSuite([]byte(suiteHead + "tests: [{" + tt.test + ", verdict: allow}]\n"))
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		s.Run("f", state, c)
		if got := report(); got != tt.want {
			t.Errorf("after %s: got %s, want %s", tt.test, got, tt.want)
		}
	}
	// Another cluster's policy of the same name is another policy.
	c.addPolicies(world(t, "policy default/b {podSelector: {}}").Policies)
	if got, want := report(), "4/5 80%; ingress of default/b, which has no rules"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWriteJUnit(t *testing.T) {
	files := []SuiteResult{
		{File: "a.yaml", Failed: 1, Tests: []TestResult{
			{Test: Test{Line: 3, Name: `<"a"> & b`}, Pass: true},
			{Test: Test{Line: 4, Name: "c"}, Failure: `want deny, got "allow" <x>`},
		}},
		{File: "b.yaml"},
	}
	var b bytes.Buffer
	if err := WriteJUnit(&b, files); err != nil {
		t.Fatal(err)
	}
	const want = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="2" failures="1">
  <testsuite name="a.yaml" tests="2" failures="1">
    <testcase classname="a.yaml" name="&lt;&#34;a&#34;&gt; &amp; b" file="a.yaml" line="3"></testcase>
    <testcase classname="a.yaml" name="c" file="a.yaml" line="4">
      <failure message="want deny, got &#34;allow&#34; &lt;x&gt;"></failure>
    </testcase>
  </testsuite>
  <testsuite name="b.yaml" tests="0" failures="0"></testsuite>
</testsuites>
`
	var back junitReport
	if err := xml.Unmarshal(b.Bytes(), &back); err != nil || back.Suites[0].Cases[0].Name != `<"a"> & b` || b.String() != want {
		t.Errorf("%v:\n%s", err, b.String())
	}
}

// TestRunSuiteAuditOnly: in audit-only mode would-deny is what a test expects, and
// it exercises what a denial does.
func TestRunSuiteAuditOnly(t *testing.T) {
	o := world(t, tested)
	o.Namespaces["default"] = &policycache.Namespace{Name: "default", Mode: "audit-only"}
	state := NewState(o, "")
	for test, want := range map[string]string{
		"{from: a, to: b, port: 82, verdict: would-deny, policy: b}": "",
		"{from: a, to: b, port: 82, verdict: would-deny, policy: c}": "want would-deny by default/c, got would-deny (no-rule): ingress isolated by default/b",
		"{from: a, to: b, port: 82, verdict: deny}":                  "want deny, got would-deny (no-rule): ingress isolated by default/b",
	} {
		s, errs := ParseSuite([]byte(suiteHead + "tests: [" + test + "]\n"))
		if len(errs) > 0 {
			t.Fatal(test, errs)
		}
		if got := s.Run("f", state, NewCoverage()).Tests[0].Failure; got != want {
			t.Errorf("%s: got %q, want %q", test, got, want)
		}
	}
	if _, errs := ParseSuite([]byte(suiteHead + "tests: [{from: a, to: b, port: 82, verdict: would-deny, policy: b, rule: 0}]\n")); len(errs) == 0 {
		t.Error("a rule that denies is let pass")
	}
}
