package demo

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/bench/lab"
)

//go:embed policies/*.yaml
var policies embed.FS

// step is one change of policy. At most one of apply and remove is set, to the
// name of a policy in its file policies/<name>.yaml.
type step struct {
	title  string
	why    string
	apply  string
	remove string
}

// story is what the demo tells, in order.
var story = []step{
	{
		title: "No policy",
		why:   "A pod that no policy selects is not isolated: everybody reaches everybody.",
	},
	{
		title: "Nobody gets into the shop",
		why:   "Selecting every pod for ingress and allowing nothing isolates them all. They still get out.",
		apply: "default-deny",
	},
	{
		title: "The api reaches its database",
		why:   "Policies add up: TCP 5432 opens for one pod, and neither a ping nor anybody else comes with it.",
		apply: "db-from-api",
	},
	{
		title: "The frontend reaches the api",
		why:   "The port goes by its name, which is the pod's TCP 8080. UDP 8080 is another port and stays shut.",
		apply: "api-from-frontend",
	},
	{
		title: "Customers reach the frontend",
		why:   "The world outside is known by its addresses: one network is let in, but for one address of it.",
		apply: "frontend-from-outside",
	},
	{
		title: "The database reaches nobody",
		why:   "Egress is judged apart from ingress: what the api asks of the database is still answered.",
		apply: "db-no-egress",
	},
	{
		title: "A mistake opens nothing",
		why:   "10.0.0.0/33 is no network. The policy isolates whom it selects, the broken rule allows nobody.",
		apply: "stranger-mistake",
	},
	{
		title:  "A policy is taken back",
		why:    "Its file is deleted: the api loses its database at once, and nothing else changes.",
		remove: "db-from-api",
	},
}

// policyText gives a policy's manifest.
func policyText(name string) (string, error) {
	b, err := policies.ReadFile("policies/" + name + ".yaml")
	if err != nil {
		return "", fmt.Errorf("read the demo's policy %s: %w", name, err)
	}
	return string(b), nil
}

// change gives the lines that tell what the step changes, marked as a diff marks
// them: the policy's name, and of one that is applied its spec as it stands.
func (s step) change() ([]string, error) {
	name, sign := s.apply, "+"
	if s.remove != "" {
		name, sign = s.remove, "-"
	}
	if name == "" {
		return nil, nil
	}
	text, err := policyText(name)
	if err != nil {
		return nil, err
	}
	var policy networkingv1.NetworkPolicy
	if err := yaml.UnmarshalStrict([]byte(text), &policy); err != nil {
		return nil, fmt.Errorf("read the demo's policy %s: %w", name, err)
	}
	lines := []string{fmt.Sprintf("%s NetworkPolicy %s/%s", sign, policy.Namespace, policy.Name)}
	if s.remove != "" {
		return lines, nil
	}
	_, spec, _ := strings.Cut(text, "\nspec:\n")
	for line := range strings.Lines(spec) {
		lines = append(lines, sign+" "+strings.TrimRight(line, "\n"))
	}
	return lines, nil
}

// enact makes the step's change in the directory that the agent watches.
func (s step) enact(dir string) error {
	switch {
	case s.apply != "":
		text, err := policyText(s.apply)
		if err != nil {
			return err
		}
		return lab.WriteFile(filepath.Join(dir, s.apply+".yaml"), text)
	case s.remove != "":
		if err := os.Remove(filepath.Join(dir, s.remove+".yaml")); err != nil {
			return fmt.Errorf("take policy %s back: %w", s.remove, err)
		}
	}
	return nil
}

// manifestDir makes the directory for the manifests: keep, which has to be new
// or empty and stays, or a temporary one, which done removes.
func manifestDir(keep string) (dir string, done func() error, err error) {
	if keep == "" {
		dir, err = os.MkdirTemp("", "portcullis-demo-")
		if err != nil {
			return "", nil, fmt.Errorf("make a directory for the manifests: %w", err)
		}
		return dir, func() error { return os.RemoveAll(dir) }, nil
	}
	entries, err := os.ReadDir(keep)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", nil, fmt.Errorf("look into the directory for the manifests: %w", err)
	}
	if len(entries) > 0 {
		return "", nil, fmt.Errorf("%s is not empty: name a new directory to keep the manifests in", keep)
	}
	if err := os.MkdirAll(keep, 0o755); err != nil {
		return "", nil, fmt.Errorf("make a directory for the manifests: %w", err)
	}
	return keep, func() error { return nil }, nil
}
