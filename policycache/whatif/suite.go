package whatif

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"portcullis/verdict"
)

// suiteVersion and suiteKind are what a document of tests says that it is.
const (
	suiteVersion = "portcullis.dev/v1"
	suiteKind    = "PolicyTest"
)

// Suite is a file of policy unit tests.
type Suite struct {
	// Manifests are the directories and files that hold the cluster beside the
	// suite's own other documents, as the file writes them.
	Manifests []string
	// Namespace is where pods and policies are that are named without one.
	Namespace string
	Tests     []Test
}

// Test is one connection and what policy is expected to say of it.
type Test struct {
	// Line is where the test is in its file.
	Line int    `json:"line" yaml:"-"`
	Name string `json:"name" yaml:"name"`
	// From and To are as explain takes them: NS/POD, POD or an IP.
	From     string `json:"from" yaml:"from"`
	To       string `json:"to" yaml:"to"`
	Protocol string `json:"protocol" yaml:"protocol"` // TCP if absent
	// Port is a number, or the name of a port of the destination pod.
	Port    string `json:"port,omitempty" yaml:"port"`
	Verdict string `json:"verdict" yaml:"verdict"` // one of expectable
	// Policy, if any, is the one that must admit the connection, or that must
	// isolate an end that turns it away; Rule is the admitting rule's index.
	Policy string `json:"policy,omitempty" yaml:"policy"`
	Rule   *int   `json:"rule,omitempty" yaml:"rule"`
}

// expectable are the verdicts that a test may expect: would-deny is for ends in
// audit-only mode.
var expectable = []string{verdict.Allow.String(), verdict.Deny.String(), verdict.WouldDeny.String()}

var (
	suiteFields = []string{"apiVersion", "kind", "metadata", "manifests", "namespace", "tests"}
	testFields  = []string{"name", "from", "to", "protocol", "port", "verdict", "policy", "rule"}
)

// ParseSuite reads a suite: of a YAML file's documents the one of kind
// PolicyTest; the others are the cluster's objects. Each error is one line that
// begins with "line N: ". The suite holds the tests that are right, and is nil
// if there is none to speak of.
func ParseSuite(data []byte) (*Suite, []error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var suite *Suite
	var errs []error
	for {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, append(errs, yamlError(err))
		}
		if len(doc.Content) == 0 {
			continue
		}
		root := doc.Content[0]
		if field(root, "kind").Value != suiteKind {
			continue
		}
		if suite != nil {
			errs = append(errs, lineError(root, "a file holds one %s, and this is the second", suiteKind))
			continue
		}
		var wrong []error
		suite, wrong = parseDocument(root)
		errs = append(errs, wrong...)
	}
	if suite == nil && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("line 1: no document is of kind %s", suiteKind))
	}
	return suite, errs
}

func lineError(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("line %d: "+format, append([]any{n.Line}, args...)...)
}

// yamlError gives the library's error the form of the others.
func yamlError(err error) error {
	var wrong *yaml.TypeError
	if errors.As(err, &wrong) {
		return errors.New(strings.Join(wrong.Errors, ", "))
	}
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if !strings.HasPrefix(text, "line ") {
		text = "line 1: " + text
	}
	return errors.New(text)
}

func parseDocument(root *yaml.Node) (*Suite, []error) {
	if v := field(root, "apiVersion"); v.Value != suiteVersion {
		return nil, []error{lineError(root, "apiVersion of a %s must be %s", suiteKind, suiteVersion)}
	}
	errs := unknownFields(root, suiteFields)
	s := &Suite{}
	var doc struct {
		Manifests yaml.Node   `yaml:"manifests"`
		Namespace string      `yaml:"namespace"`
		Tests     []yaml.Node `yaml:"tests"`
	}
	if err := root.Decode(&doc); err != nil {
		return nil, append(errs, yamlError(err))
	}
	s.Namespace = doc.Namespace
	if err := decodeList(&doc.Manifests, &s.Manifests); err != nil {
		errs = append(errs, yamlError(err))
	}
	if len(doc.Tests) == 0 {
		errs = append(errs, lineError(root, "there are no tests"))
	}
	for i := range doc.Tests {
		t, wrong := s.parseTest(&doc.Tests[i])
		if len(wrong) == 0 {
			s.Tests = append(s.Tests, t)
		}
		errs = append(errs, wrong...)
	}
	return s, errs
}

// decodeList reads a list of strings, or one string without a list around it.
func decodeList(n *yaml.Node, list *[]string) error {
	if n.Kind != yaml.ScalarNode {
		return n.Decode(list)
	}
	*list = []string{n.Value}
	return nil
}

func unknownFields(n *yaml.Node, known []string) (errs []error) {
	for i := 0; n.Kind == yaml.MappingNode && i < len(n.Content); i += 2 {
		if key := n.Content[i]; !slices.Contains(known, key.Value) {
			errs = append(errs, lineError(key, "unknown field %q, want one of %s", key.Value, strings.Join(known, ", ")))
		}
	}
	return errs
}

// parseTest reads a test and checks what can be checked without a cluster.
func (s *Suite) parseTest(n *yaml.Node) (Test, []error) {
	t := Test{Line: n.Line}
	if errs := unknownFields(n, testFields); len(errs) > 0 {
		return t, errs
	}
	if err := n.Decode(&t); err != nil {
		return t, []error{yamlError(err)}
	}
	switch {
	case t.From == "" || t.To == "":
		return t, []error{lineError(n, "a test needs from and to")}
	case !slices.Contains(expectable, t.Verdict):
		return t, []error{lineError(n, "verdict must be allow, deny or would-deny, not %q", t.Verdict)}
	case t.Rule != nil && t.Policy == "":
		return t, []error{lineError(n, "a rule needs the policy whose it is")}
	case t.Rule != nil && !verdicts[t.Verdict]:
		return t, []error{lineError(n, "no rule denies: name the policy alone")}
	}
	if t.Policy != "" && !strings.Contains(t.Policy, "/") {
		t.Policy = orDefault(s.Namespace) + "/" + t.Policy
	}
	t.Protocol = strings.ToUpper(t.Protocol)
	if t.Protocol == "" {
		t.Protocol = "TCP"
	}
	if t.Name == "" {
		t.Name = strings.TrimSpace(fmt.Sprintf("%s to %s, %s %s", t.From, t.To, t.Protocol, t.Port))
	}
	return t, nil
}

func orDefault(namespace string) string {
	if namespace == "" {
		return "default"
	}
	return namespace
}
