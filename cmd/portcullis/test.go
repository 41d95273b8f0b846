package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"portcullis/policycache/manifest"
	"portcullis/policycache/whatif"
)

const testLong = `Test runs unit tests of policy. A file holds a document with connections and what
is expected of them,

  apiVersion: portcullis.dev/v1
  kind: PolicyTest
  manifests: cluster/          # directories or files beside this one, if any
  namespace: shop              # of pods and policies named without one
  tests:
  - name: the api reaches its database   # optional
    from: api                  # NS/POD, POD or an IP
    to: db
    port: postgres             # a number, or a name that the destination gives it
    protocol: TCP              # TCP unless given
    verdict: allow             # or deny, or would-deny where audit-only
    policy: db                 # optional: admits it, or isolates who denies it
    rule: 0                    # optional: the admitting rule's index

and, if you like, Pods, Namespaces, Nodes and NetworkPolicies as other documents.
Pods need no address in a test.

The exit code is 1 if a test fails or the coverage is below --coverage-min, and 2
if a file can't be read, or not all of it.`

// testOptions are the flags of test.
type testOptions struct {
	output, junit string
	verbose       bool
	coverage      bool
	coverageMin   float64
}

// newTestCmd makes the command that runs policy unit tests.
func newTestCmd() *cobra.Command {
	var o testOptions
	cmd := &cobra.Command{
		Use:   "test FILE...",
		Short: "Run unit tests of policy",
		Long:  testLong,
		Example: `  portcullis test shop_test.yaml --coverage
  portcullis test *_test.yaml --junit report.xml --coverage-min 80`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			if err := o.check(); err != nil {
				return err
			}
			coverage := whatif.NewCoverage()
			results, bad := runSuites(cmd.ErrOrStderr(), files, coverage)
			report := coverage.Report()
			if err := o.write(cmd.OutOrStdout(), results, report); err != nil {
				return err
			}
			return o.outcome(results, report, bad)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.output, "output", "o", "text", "text or json")
	f.StringVar(&o.junit, "junit", "", "write a JUnit report to this `FILE`, too")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "name the tests that pass, too")
	f.BoolVar(&o.coverage, "coverage", false, "say which rules no test exercises")
	f.Float64Var(&o.coverageMin, "coverage-min", 0, "fail if less than `PERCENT` of the rules are exercised")
	return answerable(cmd)
}

func (o *testOptions) check() error {
	if o.output != "text" && o.output != "json" {
		return fmt.Errorf("unknown output %q: want text or json", o.output)
	}
	if o.coverageMin < 0 || o.coverageMin > 100 {
		return fmt.Errorf("--coverage-min must be 0 to 100, not %g", o.coverageMin)
	}
	o.coverage = o.coverage || o.coverageMin > 0
	return nil
}

// runSuites runs the files' tests. What can't be read is a line of errs each,
// and bad is their number.
func runSuites(errs io.Writer, files []string, c *whatif.Coverage) (results []whatif.SuiteResult, bad int) {
	results = []whatif.SuiteResult{}
	for _, file := range files {
		suite, state, wrong := loadSuite(file)
		for _, err := range wrong {
			fmt.Fprintln(errs, oneLine(err))
		}
		bad += len(wrong)
		if state != nil {
			warnProblems(errs, state)
			results = append(results, suite.Run(file, state, c))
		}
	}
	return results, bad
}

// loadSuite reads a file of tests and the state that it is about. The state is
// nil if nothing can be run.
func loadSuite(file string) (*whatif.Suite, *whatif.State, []error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, []error{err}
	}
	suite, errs := whatif.ParseSuite(data)
	for i, err := range errs {
		errs[i] = fmt.Errorf("%s: %w", file, err)
	}
	if suite == nil {
		return nil, nil, errs
	}
	var dirs []string
	for _, path := range suite.Manifests {
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(file), path)
		}
		dirs = append(dirs, path)
	}
	objects, err := manifest.LoadWith(dirs, filepath.Base(file), data)
	if err != nil {
		return nil, nil, append(errs, fmt.Errorf("%s: %w", file, err))
	}
	return suite, whatif.NewState(objects, suite.Namespace), errs
}

func (o *testOptions) write(w io.Writer, results []whatif.SuiteResult, report *whatif.CoverageReport) error {
	if o.junit != "" {
		if err := o.writeJUnit(results); err != nil {
			return err
		}
	}
	if !o.coverage {
		report = nil
	}
	if o.output == "json" {
		return unlessClosed(whatif.WriteResultsJSON(w, results, report))
	}
	for i := range results {
		if err := results[i].WriteText(w, o.verbose); err != nil {
			return unlessClosed(err)
		}
	}
	if report == nil {
		return nil
	}
	return unlessClosed(report.WriteText(w))
}

func (o *testOptions) writeJUnit(results []whatif.SuiteResult) error {
	f, err := os.Create(o.junit)
	if err != nil {
		return fmt.Errorf("writing the JUnit report: %w", err)
	}
	return errors.Join(whatif.WriteJUnit(f, results), f.Close())
}

func (o *testOptions) outcome(results []whatif.SuiteResult, report *whatif.CoverageReport, bad int) error {
	failed := 0
	for i := range results {
		failed += results[i].Failed
	}
	switch {
	case failed > 0:
		return exitError{code: 1}
	case bad > 0:
		return exitError{code: 2, err: errors.New("not everything could be read, see above")}
	case report.Percent < o.coverageMin:
		return exitError{code: 1, err: fmt.Errorf("coverage is %.1f%%, less than %g%%", report.Percent, o.coverageMin)}
	}
	return nil
}
