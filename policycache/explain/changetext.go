package explain

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"sigs.k8s.io/yaml"

	networkingv1 "k8s.io/api/networking/v1"
)

// changeLine is a change in JSON: of an existing policy the patch that kubectl patch
// --type=json takes, else the policy to create.
type changeLine struct {
	Direction string       `json:"direction"`
	Why       string       `json:"why"`
	Policy    string       `json:"policy"`
	Patch     []patchLine  `json:"patch,omitempty"`
	Create    *createdLine `json:"create,omitempty"`
	Note      string       `json:"note,omitempty"`
}

type patchLine struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// createdLine is a NetworkPolicy without what only a server would fill in.
type createdLine struct {
	APIVersion string                         `json:"apiVersion"`
	Kind       string                         `json:"kind"`
	Metadata   map[string]string              `json:"metadata"`
	Spec       networkingv1.NetworkPolicySpec `json:"spec"`
}

func (ch *Change) created() *createdLine {
	return &createdLine{ch.Changed.APIVersion, ch.Changed.Kind,
		map[string]string{"namespace": ch.Changed.Namespace, "name": ch.Changed.Name}, ch.Changed.Spec}
}

func newChangeLines(changes []Change) (lines []changeLine) {
	for i := range changes {
		ch := &changes[i]
		l := changeLine{Direction: ch.Direction, Why: ch.Why, Policy: ch.Policy, Note: ch.Note}
		if ch.New {
			l.Create = ch.created()
		} else {
			l.Patch = []patchLine{{"add", ch.Path, ch.Value}}
		}
		lines = append(lines, l)
	}
	return lines
}

var listIndex = regexp.MustCompile(`/(\d+)`)

// field writes a patch's path as manifests are spoken of: spec.ingress[0].from.
func (ch *Change) field() string {
	path := strings.TrimSuffix(strings.TrimPrefix(ch.Path, "/"), "/-")
	return strings.ReplaceAll(listIndex.ReplaceAllString(path, "[$1]"), "/", ".")
}

// writeChange writes what is missing, and the YAML that would do.
func writeChange(b *bytes.Buffer, ch *Change) {
	fmt.Fprintf(b, "  change   %s\n", ch.Why)
	var added any = ch.Value
	switch {
	case ch.New:
		fmt.Fprintf(b, "           to admit it, add this policy%s:\n", inBrackets(ch.Note))
		added = ch.created()
	case strings.HasSuffix(ch.Path, "/-"):
		fmt.Fprintf(b, "           to admit it, add to %s of %s%s:\n", ch.field(), ch.Policy, inBrackets(ch.Note))
		added = []any{ch.Value}
	default:
		fmt.Fprintf(b, "           to admit it, give %s as %s%s:\n", ch.Policy, ch.field(), inBrackets(ch.Note))
	}
	text, err := yaml.Marshal(added)
	if err != nil {
		panic(err) // API types can't fail
	}
	for line := range strings.Lines(string(text)) {
		b.WriteString("             " + line)
	}
}

func inBrackets(note string) string {
	if note == "" {
		return ""
	}
	return " (" + note + ")"
}
