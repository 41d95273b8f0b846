package whatif

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"portcullis/policycache/explain"
)

// SuiteResult is what came of a suite's tests.
type SuiteResult struct {
	File   string       `json:"file"`
	Tests  []TestResult `json:"tests"`
	Failed int          `json:"failed"`
}

// TestResult is what came of one test.
type TestResult struct {
	Test
	Pass bool `json:"pass"`
	// Got is the judgement; nil if the question couldn't be answered.
	Got *Judgement `json:"got"`
	// Failure says in a line what is otherwise than expected; empty if nothing.
	Failure string `json:"failure,omitempty"`
}

// Run runs the suite's tests against a state and notes in the coverage which
// rules they exercise. Two ends with both IP families are judged by each.
func (s *Suite) Run(file string, state *State, c *Coverage) SuiteResult {
	r := SuiteResult{File: file, Tests: []TestResult{}}
	c.addPolicies(state.objects.Policies)
	for i := range s.Tests {
		t := s.Tests[i].run(state, c)
		if !t.Pass {
			r.Failed++
		}
		r.Tests = append(r.Tests, t)
	}
	return r
}

func (t *Test) run(state *State, c *Coverage) TestResult {
	r := TestResult{Test: *t}
	answers, err := state.cluster.AskAll(explain.Query{From: t.From, To: t.To, Protocol: t.Protocol, Port: t.Port})
	if err != nil {
		r.Failure = state.withNear(err).Error()
		return r
	}
	var failures []string
	for i := range answers {
		d := &answers[i].Decision
		c.exercise(state.objects.Policies, d)
		j := judgement(d, []string{egress, ingress})
		failure := t.compare(&j)
		failures = append(failures, failure)
		if r.Got == nil || r.Failure == "" && failure != "" {
			r.Got, r.Failure = &j, failure
		}
	}
	// If only one of two IP families fails, or both do differently, say which.
	if i := slices.Index(failures, r.Failure); r.Failure != "" && len(slices.Compact(failures)) > 1 {
		r.Failure = fmt.Sprintf("%s to %s: %s", answers[i].Flow.Src, answers[i].Flow.Dst, r.Failure)
	}
	r.Pass = r.Failure == ""
	return r
}

// withNear adds to an error about an unknown pod the pods that may be meant.
func (s *State) withNear(err error) error {
	var unknown *explain.UnknownPodError
	if !errors.As(err, &unknown) {
		return err
	}
	if near := s.cluster.Near(unknown.Key); len(near) > 0 {
		return fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
	}
	return err
}

// compare says what is wrong with a judgement, or nothing.
func (t *Test) compare(j *Judgement) string {
	if j.Verdict != t.Verdict {
		return fmt.Sprintf("want %s, got %s", t.Verdict, j)
	}
	if t.Policy == "" {
		return ""
	}
	for _, s := range []*Side{j.Egress, j.Ingress} {
		switch {
		case s == nil || s.Verdict != j.Verdict:
		case !verdicts[t.Verdict] && slices.Contains(s.Policies, t.Policy):
			return ""
		case s.AllowedBy != nil && s.AllowedBy.Policy == t.Policy && (t.Rule == nil || *t.Rule == s.AllowedBy.Rule):
			return ""
		}
	}
	who := t.Policy
	if t.Rule != nil {
		who = fmt.Sprintf("rule %d of %s", *t.Rule, t.Policy)
	}
	return fmt.Sprintf("want %s by %s, got %s", t.Verdict, who, j)
}

// WriteText writes the result as "go test" does: each failure, with verbose
// each test, and a line for the file.
func (r *SuiteResult) WriteText(w io.Writer, verbose bool) error {
	var b strings.Builder
	for i := range r.Tests {
		t := &r.Tests[i]
		switch {
		case !t.Pass:
			fmt.Fprintf(&b, "--- FAIL: %s\n    %s:%d: %s\n", t.Name, r.File, t.Line, t.Failure)
		case verbose:
			fmt.Fprintf(&b, "--- PASS: %s\n    %s:%d: %s\n", t.Name, r.File, t.Line, t.Got)
		}
	}
	if r.Failed > 0 {
		fmt.Fprintf(&b, "FAIL\t%s\t%d of %s failed\n", r.File, r.Failed, tests(len(r.Tests)))
	} else {
		fmt.Fprintf(&b, "ok\t%s\t%s\n", r.File, tests(len(r.Tests)))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func tests(n int) string {
	if n == 1 {
		return "1 test"
	}
	return fmt.Sprintf("%d tests", n)
}

// WriteResultsJSON writes results, and the coverage unless it is nil, as one
// indented object.
func WriteResultsJSON(w io.Writer, files []SuiteResult, c *CoverageReport) error {
	all := struct {
		Files    []SuiteResult   `json:"files"`
		Coverage *CoverageReport `json:"coverage,omitempty"`
	}{files, c}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(all)
}

// The elements of a JUnit report, as CI systems read them.
type junitReport struct {
	XMLName  xml.Name     `xml:"testsuites"`
	Tests    int          `xml:"tests,attr"`
	Failures int          `xml:"failures,attr"`
	Suites   []junitSuite `xml:"testsuite"`
}

type junitSuite struct {
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Class   string        `xml:"classname,attr"`
	Name    string        `xml:"name,attr"`
	File    string        `xml:"file,attr"`
	Line    int           `xml:"line,attr"`
	Failure *junitFailure `xml:"failure"`
}

type junitFailure struct {
	Message string `xml:"message,attr"`
}

// WriteJUnit writes results as a JUnit report.
func WriteJUnit(w io.Writer, files []SuiteResult) error {
	var report junitReport
	for i := range files {
		r := &files[i]
		s := junitSuite{Name: r.File, Tests: len(r.Tests), Failures: r.Failed}
		for j := range r.Tests {
			t := &r.Tests[j]
			c := junitCase{Class: r.File, Name: t.Name, File: r.File, Line: t.Line}
			if !t.Pass {
				c.Failure = &junitFailure{t.Failure}
			}
			s.Cases = append(s.Cases, c)
		}
		report.Tests, report.Failures = report.Tests+s.Tests, report.Failures+s.Failures
		report.Suites = append(report.Suites, s)
	}
	text, err := xml.MarshalIndent(&report, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s%s\n", xml.Header, text)
	return err
}
