package whatif

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/verdict"
)

// Coverage tells which rules of which policies tests exercise. A rule is
// exercised when it is the one that admits a connection, the first that does by
// policy name and index. A policy without rules in a direction that it isolates
// counts as one rule there, which is exercised when it turns a connection away.
type Coverage struct {
	units map[unit]bool // whether it was exercised
}

// unit is what can be exercised. Two policies of one name and different content,
// of the clusters of two suites, are two.
type unit struct {
	policy, spec string
	direction    string
	rule         int // noRule for isolation without rules
}

const noRule = -1

// NewCoverage makes a coverage of nothing yet.
func NewCoverage() *Coverage { return &Coverage{units: map[unit]bool{}} }

func specText(p *networkingv1.NetworkPolicy) string {
	text, _ := json.Marshal(&p.Spec) // what came from JSON can be written as such
	return string(text)
}

// addPolicies adds what can be exercised of a cluster's policies.
func (c *Coverage) addPolicies(policies map[string]*networkingv1.NetworkPolicy) {
	for key, p := range policies {
		spec := specText(p)
		c.addDirection(unit{policy: key, spec: spec, direction: ingress}, len(p.Spec.Ingress), isolates(p, networkingv1.PolicyTypeIngress))
		c.addDirection(unit{policy: key, spec: spec, direction: egress}, len(p.Spec.Egress), isolates(p, networkingv1.PolicyTypeEgress))
	}
}

func (c *Coverage) addDirection(u unit, rules int, isolates bool) {
	for u.rule = range rules {
		c.add(u)
	}
	if rules == 0 && isolates {
		u.rule = noRule
		c.add(u)
	}
}

func (c *Coverage) add(u unit) {
	if _, known := c.units[u]; !known {
		c.units[u] = false
	}
}

// isolates tells whether a policy has a type, which is Ingress, and Egress if
// there is an egress rule, for one that names none.
func isolates(p *networkingv1.NetworkPolicy, t networkingv1.PolicyType) bool {
	if len(p.Spec.PolicyTypes) == 0 {
		return t == networkingv1.PolicyTypeIngress || len(p.Spec.Egress) > 0
	}
	return slices.Contains(p.Spec.PolicyTypes, t)
}

// exercise notes what took part in a decision.
func (c *Coverage) exercise(policies map[string]*networkingv1.NetworkPolicy, d *verdict.Decision) {
	note := func(policy, direction string, rule int) {
		u := unit{policy: policy, direction: direction, rule: rule}
		if p := policies[policy]; p != nil {
			u.spec = specText(p)
		}
		if _, counts := c.units[u]; counts {
			c.units[u] = true
		}
	}
	for direction, s := range map[string]*verdict.Side{egress: &d.Egress, ingress: &d.Ingress} {
		if s.AllowedBy().Policy != "" {
			note(s.AllowedBy().Policy, direction, s.AllowedBy().Rule)
		}
		for _, p := range s.Policies() {
			if s.Verdict != verdict.Allow {
				note(p, direction, noRule)
			}
		}
	}
}

// CoverageReport is a coverage in numbers, and what is missing.
type CoverageReport struct {
	Rules     int `json:"rules"`
	Exercised int `json:"exercised"`
	// Percent is 100 when there are no rules at all.
	Percent float64     `json:"percent"`
	Missing []Uncovered `json:"missing"`
}

// Uncovered is a rule that no test exercises; without a rule it is a policy
// that isolates in that direction and has no rules there.
type Uncovered struct {
	Policy    string `json:"policy"`
	Direction string `json:"direction"`
	Rule      *int   `json:"rule,omitempty"`
}

// Report gives the coverage so far, what is missing sorted by policy.
func (c *Coverage) Report() *CoverageReport {
	r := &CoverageReport{Rules: len(c.units), Percent: 100, Missing: []Uncovered{}}
	var missing []unit
	for u, exercised := range c.units {
		if exercised {
			r.Exercised++
		} else {
			missing = append(missing, u)
		}
	}
	slices.SortFunc(missing, func(a, b unit) int {
		return cmp.Or(cmp.Compare(a.policy, b.policy), -cmp.Compare(a.direction, b.direction), cmp.Compare(a.rule, b.rule), cmp.Compare(a.spec, b.spec))
	})
	for _, u := range missing {
		one := Uncovered{Policy: u.policy, Direction: u.direction}
		if u.rule != noRule {
			one.Rule = &u.rule
		}
		r.Missing = append(r.Missing, one)
	}
	if r.Rules > 0 {
		r.Percent = 100 * float64(r.Exercised) / float64(r.Rules)
	}
	return r
}

// String names the rule for people.
func (u *Uncovered) String() string {
	if u.Rule == nil {
		return fmt.Sprintf("%s of %s, which has no rules", u.Direction, u.Policy)
	}
	return fmt.Sprintf("%s rule %d of %s", u.Direction, *u.Rule, u.Policy)
}

// WriteText writes the coverage for people.
func (r *CoverageReport) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "coverage: %.1f%% of rules (%d of %d)\n", r.Percent, r.Exercised, r.Rules)
	for i := range r.Missing {
		fmt.Fprintf(&b, "    not exercised: %s\n", r.Missing[i].String())
	}
	_, err := io.WriteString(w, b.String())
	return err
}
