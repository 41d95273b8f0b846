package demo

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"portcullis/bench/lab"
	"portcullis/verdict"
)

// TestStoryChangesNumbers holds the story to what inForce relies on: each step
// but the first changes the number of policies, and takes back only what is
// there.
func TestStoryChangesNumbers(t *testing.T) {
	applied := map[string]bool{}
	for i, s := range story {
		switch {
		case s.apply != "" && s.remove != "":
			t.Errorf("step %d applies and removes", i)
		case s.apply != "":
			if applied[s.apply] {
				t.Errorf("step %d applies %s again", i, s.apply)
			}
			applied[s.apply] = true
		case s.remove != "":
			if !applied[s.remove] {
				t.Errorf("step %d removes %s, which isn't there", i, s.remove)
			}
			delete(applied, s.remove)
		case i > 0:
			t.Errorf("step %d changes nothing", i)
		}
	}
}

// TestPolicies looks at each embedded policy: its file's name is its own, and
// some step applies it.
func TestPolicies(t *testing.T) {
	files, err := filepath.Glob("policies/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		text, err := policyText(name)
		if err != nil {
			t.Fatal(err)
		}
		var policy networkingv1.NetworkPolicy
		if err := yaml.UnmarshalStrict([]byte(text), &policy); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		if policy.Name != name || policy.Kind != "NetworkPolicy" {
			t.Errorf("%s is %s %s", file, policy.Kind, policy.Name)
		}
		if !slices.ContainsFunc(story, func(s step) bool { return s.apply == name }) {
			t.Errorf("no step applies %s", file)
		}
	}
}

func TestChange(t *testing.T) {
	for _, tt := range []struct {
		step step
		want string
	}{
		{step{}, ""},
		{step{remove: "db-no-egress"}, "- NetworkPolicy shop/db-no-egress"},
		{step{apply: "db-no-egress"}, "+ NetworkPolicy shop/db-no-egress|+   podSelector: {matchLabels: {app: db}}|+   policyTypes: [Egress]"},
	} {
		got, err := tt.step.change()
		if err != nil || strings.Join(got, "|") != tt.want {
			t.Errorf("%+v: %q, %v", tt.step, got, err)
		}
	}
	if _, err := (step{apply: "none"}).change(); err == nil {
		t.Error("a policy that isn't there is no error")
	}
}

// conn makes a connection between the named, over IPv4 or IPv6.
func conn(from, head string, v6 bool) *connection {
	to, port, _ := strings.Cut(head, " ")
	all := connections(lab.Routed)
	i := slices.IndexFunc(all, func(c connection) bool {
		return cast[c.row].name == from && c.target().to == to && c.target().head == port && c.dst.Is6() == v6
	})
	return &all[i]
}

// with sets what the witnesses say: "R" really connects, "E" explain allows,
// "L" and "D" the log allows or denies, "!" a rule decides.
func (c *connection) with(witnesses string) *connection {
	for _, w := range witnesses {
		switch w {
		case 'R':
			c.reached = true
		case 'E':
			c.predicted.Verdict = verdict.Allow
		case 'L':
			c.logged = append(c.logged, decision{Verdict: "allow"})
		case 'D':
			c.logged = append(c.logged, decision{Verdict: "deny"})
		case '!':
			c.predicted.Reason = verdict.ReasonRule
		}
	}
	return c
}

func TestConnections(t *testing.T) {
	all := connections(lab.Bridged)
	if len(all) != (len(cast)*len(targets)-len(targets))*2 {
		t.Errorf("%d connections", len(all))
	}
	for i := range all {
		if c := &all[i]; c.src == c.dst || c.src.Is4() != c.dst.Is4() {
			t.Errorf("%s: %s to %s", c, c.src, c.dst)
		}
	}
}

func TestDifference(t *testing.T) {
	for _, tt := range []struct{ witnesses, want string }{
		{"RE", ""}, {"", ""}, {"RE!L", ""}, {"!D", ""}, {"REL", ""}, {"!DD", ""},
		{"R", "really connects, but explain says deny"},
		{"E", "doesn't really connect, but explain says allow"},
		{"RE!", "really connects as explain says, but the decision log has no line about it"},
		{"!", "doesn't really connect as explain says, but the decision log has no line about it"},
		{"!L", "doesn't really connect, but the decision log says allow"},
		{"RE!LD", "really connects, but the decision log says deny"},
	} {
		got := conn("api", "db :5432", true).with(tt.witnesses).difference()
		if want := "api -> db:5432 tcp over IPv6: " + tt.want; got != want && (got != "" || tt.want != "") {
			t.Errorf("%s: %q, want %q", tt.witnesses, got, tt.want)
		}
	}
}

func TestTables(t *testing.T) {
	all := []connection{
		*conn("api", "db :5432", false).with("RE"), *conn("api", "db :5432", true).with("RE"),
		*conn("api", "db ping", false), *conn("api", "db ping", true),
		*conn("client", "api udp", false).with("R"), *conn("client", "api udp", true),
		*conn("client", "stranger :80", false), *conn("client", "stranger :80", true).with("E"),
		*conn("crawler", "stranger :80", false).with("RE"), *conn("crawler", "stranger :80", true),
	}
	for path, color := range map[string]bool{"testdata/tables.golden": false, "testdata/tables-color.golden": true} {
		var out strings.Builder
		(&printer{w: &out, color: color}).tables(all)
		golden(t, path, []byte(out.String()))
	}
}

// dec makes a decision: the verdict, and the isolating policy and rule of each
// direction that is isolated, as "egress=p", "ingress=p:0".
func dec(v string, sides ...string) decision {
	d := decision{Verdict: v, Reason: "self", Egress: &side{Verdict: "allow"}}
	for _, text := range sides {
		direction, policy, _ := strings.Cut(text, "=")
		policy, rule, admitted := strings.Cut(policy, ":")
		s := &side{Verdict: "deny", Isolated: true, Policies: []string{policy}}
		if admitted {
			s.Verdict = "allow"
			s.AllowedBy = &struct {
				Policy string
				Rule   int
			}{policy, int(rule[0] - '0')}
		}
		if direction == "egress" {
			d.Egress = s
		} else {
			d.Ingress = s
		}
	}
	return d
}

func TestWhy(t *testing.T) {
	for _, tt := range []struct {
		d    decision
		want string
	}{
		{dec("allow"), "self"},
		{dec("allow", "ingress=a/p:3"), "ingress: rule 3 of a/p admits it"},
		{dec("allow", "egress=a/e:1", "ingress=a/p:3"), "egress: rule 1 of a/e admits it\ningress: rule 3 of a/p admits it"},
		{dec("deny", "ingress=a/p"), "ingress: isolated by a/p; no rule admits it"},
		{dec("deny", "egress=a/e:1", "ingress=a/p"), "ingress: isolated by a/p; no rule admits it"},
		{dec("deny", "egress=a/e", "ingress=a/p"), "egress: isolated by a/e; no rule admits it\ningress: isolated by a/p; no rule admits it"},
		{decision{Verdict: "deny", Reason: "truncated"}, "truncated"},
	} {
		if got := tt.d.why(); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.d, got, tt.want)
		}
	}
}

// said makes a connection that the log tells of.
func said(from, head string, v6 bool, d decision) connection {
	c := conn(from, head, v6)
	c.logged = []decision{d}
	return *c
}

func TestGroups(t *testing.T) {
	h := history{}
	deny, allow := dec("deny", "ingress=a/p"), dec("allow", "ingress=a/q:0")
	show := func(all ...connection) string {
		var out strings.Builder
		(&printer{w: &out}).decisions(h.groups(all), false)
		return out.String()
	}
	first := show(said("client", "db :5432", false, deny), said("api", "db :5432", false, deny),
		said("api", "db :5432", true, deny), *conn("api", "db ping", false))
	again := show(said("client", "db :5432", false, deny), said("api", "db :5432", false, deny), said("api", "db :5432", true, allow))
	for _, tt := range []struct{ got, want string }{
		{first, `What the decision log tells:
   DENY   client, api -> db:5432 tcp
          ingress: isolated by a/p; no rule admits it

`},
		{again, `What the decision log tells:
   ALLOW  api -> db:5432 tcp, over IPv6 only
          ingress: rule 0 of a/q admits it
   (and 2 more: -v shows all)

`},
		{show(), "The decision log tells nothing: the kernel asks the agent about isolated pods only.\n\n"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s\nwant\n%s", tt.got, tt.want)
		}
	}
}

func TestLogReader(t *testing.T) {
	r := &logReader{path: filepath.Join(t.TempDir(), "log")}
	const line = `{"verdict":"deny","protocol":"TCP","src":{"ip":"10.0.0.1","port":7},"dst":{"ip":"10.0.0.2","port":80},"latencyNs":5}` + "\n"
	for _, tt := range []struct {
		write string
		want  int
	}{
		{"", 0}, {line, 1}, {"", 0}, {line + line[:20], 1}, {"", 0}, {line[20:], 1},
	} {
		f, err := os.OpenFile(r.path, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(tt.write); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := r.more()
		if err != nil || len(got) != tt.want {
			t.Fatalf("after %q: %d decisions, %v", tt.write, len(got), err)
		}
		want := flow{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), "TCP", 80}
		for _, d := range got {
			if d.flow() != want || d.Verdict != "deny" || d.LatencyNs != 5 {
				t.Errorf("read %+v", d)
			}
		}
	}
	if got, err := (&logReader{path: r.path + ".none"}).more(); err != nil || len(got) > 0 {
		t.Errorf("no log yet: %v, %v", got, err)
	}
	if err := os.WriteFile(r.path, []byte("{}\nnonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&logReader{path: r.path}).more(); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("nonsense in the log: %v", err)
	}
}

func TestMetric(t *testing.T) {
	const text = "# HELP p_x Policies.\n# TYPE p_x gauge\np_x_total 4\np_x 3\nhuge 1.2e+03\nodd many\n"
	for _, tt := range []struct {
		name string
		want int
		err  string
	}{
		{"p_x", 3, ""}, {"huge", 1200, ""}, {"odd", 0, "odd"}, {"none", 0, "no metric none"},
	} {
		got, err := metric(text, tt.name)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %d, %v", tt.name, got, err)
		}
	}
}

func TestLastWords(t *testing.T) {
	for _, tt := range []struct{ output, want string }{
		{"", "it ended without a word"},
		{"portcullis: no NFQUEUE\n", "no NFQUEUE"},
		{"level=INFO msg=x\nportcullis: no NFQUEUE\n\n", "no NFQUEUE"},
	} {
		if got := lastWords(tt.output); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.output, got, tt.want)
		}
	}
}
