package whatif

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"portcullis/policycache"
)

// proposed is a state in which only the web's pods reach the database, which
// has moved, and nobody leaves the cluster from there.
const proposed = `
pod shop/db-0 10.0.0.20,fd00::20 app=db
pod shop/web-7d4b9c6f5d-x2x1z 10.0.0.1 app=web pod-template-hash=7d4b9c6f5d
pod shop/old 10.0.0.3 app=web phase=Succeeded
pod shop/six fd00::6 app=web
pod shop/new - app=new
pod kube-system/proxy 192.168.0.1 host=true
policy shop/db {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]}]}
`

func TestReplay(t *testing.T) {
	state := NewState(world(t, proposed), "")
	for _, tt := range []struct{ name, conn, want string }{
		{"a pod with another address", "deny/no-rule eI 10.0.0.1=shop/web-7d4b9c6f5d-x2x1z 10.0.0.2=shop/db-0 TCP 5432", "allow shop/web shop/db-0 rule"},
		{"another port", "allow/rule eI 10.0.0.1=shop/web-7d4b9c6f5d-x2x1z 10.0.0.2=shop/db-0 TCP 80", "deny shop/web shop/db-0 no-rule"},
		{"as before", "allow/rule eI 10.0.0.1=shop/web-7d4b9c6f5d-x2x1z 10.0.0.2=shop/db-0 TCP 5432", "unchanged"},
		{"would-deny is a denial", "would-deny/no-rule eI 203.0.113.1 10.0.0.2=shop/db-0 TCP 5432", "unchanged"},
		{"so is revoked", "revoked/no-rule eI 203.0.113.1 10.0.0.2=shop/db-0 TCP 5432", "unchanged"},
		{"a stand-in", "deny/no-rule eI 10.0.0.7=shop/web-5d7d4b9c6f-bcdfg 10.0.0.2=shop/db-0 TCP 5432", "allow shop/web shop/db-0 rule stand-in"},
		{"a pod that has finished", "deny/no-rule eI 10.0.0.3=shop/old 10.0.0.2=shop/db-0 TCP 5432", "allow shop/old shop/db-0 rule"},
		{"a pod without an address", "allow/rule eI 10.0.0.4=shop/new 10.0.0.2=shop/db-0 TCP 5432", "deny shop/new shop/db-0 no-rule"},
		{"the other family", "deny/no-rule eI 10.0.0.6=shop/six 10.0.0.2=shop/db-0 TCP 5432", "allow shop/six shop/db-0 rule"},
		{"no family in common", "allow/rule eI 10.0.0.6=shop/six 203.0.113.1 TCP 5432", "its ends have no IP family in common any more"},
		{"a pod that has gone", "allow/rule eI 10.0.0.8=shop/gone 10.0.0.2=shop/db-0 TCP 5432", `there is no pod "shop/gone"`},
		{"an address that is a pod's now", "allow/rule I 10.0.0.1 10.0.0.2=shop/db-0 TCP 5432", "unchanged"},
		{"only the source was judged", "allow/rule e 10.0.0.1=shop/web-7d4b9c6f5d-x2x1z 10.0.0.2=shop/db-0 TCP 80", "unchanged"},
		{"neither was judged", "allow/not-isolated - 203.0.113.1 10.0.0.2=shop/db-0 TCP 80", "unchanged"},
		{"egress", "allow/rule Ei 10.0.0.2=shop/db-0 203.0.113.1 TCP 443", "deny shop/db-0 203.0.113.1 no-rule"},
		{"a node, by its address", "allow/own-node i 192.168.9.9 10.0.0.2=shop/db-0 TCP 1", "unchanged"},
		{"its own node now", "deny/no-rule I 192.168.0.1 10.0.0.2=shop/db-0 TCP 1", "allow 192.168.0.1 (node n1) shop/db-0 own-node"},
		{"itself", "allow/self ei 10.0.0.2=shop/db-0 10.0.0.2=shop/db-0 TCP 1", "unchanged"},
		{"a fragment is denied where policy isolates", "allow/not-isolated ei 10.0.0.1=shop/web-7d4b9c6f5d-x2x1z 10.0.0.2=shop/db-0 TCP -", "deny shop/web shop/db-0 malformed"},
		{"forged", "deny/forged - 10.0.0.1 10.0.0.2 TCP 1", "policy wasn't asked (forged)"},
		{"not ready", "deny/not-ready - 10.0.0.1 10.0.0.2 TCP 1", "policy wasn't asked (not-ready)"},
		{"unreadable", "deny/malformed - - - 0 -", "the packet's addresses couldn't be read"},
	} {
		r := NewReplay(state)
		readAll(t, r.Add, tt.conn+" 3")
		if got := outcome(t, r.Report()); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

// outcome gives a report of one record, which counts for three, in words.
func outcome(t *testing.T, r *Report) string {
	t.Helper()
	var words []string
	for _, c := range r.Changes {
		words = append(words, c.Proposed.Verdict, c.From, c.To, c.Proposed.Reason)
		if c.Connections != 3 {
			t.Errorf("%+v: counted %d", c, c.Connections)
		}
	}
	for _, n := range r.NotPlaced {
		words = append(words, n.Why)
	}
	if r.Unchanged > 0 {
		words = append(words, "unchanged")
	}
	if r.StandIns > 0 {
		words = append(words, "stand-in")
	}
	sum := r.Unchanged + r.Denied + r.Allowed
	for _, n := range r.NotPlaced {
		sum += n.Connections
	}
	if sum != 3 || r.Connections != 3 {
		t.Errorf("%+v: the numbers don't add up", r)
	}
	return strings.Join(words, " ")
}

// Records of one pair, port and outcome are one change; denials come first, and
// addresses in the order of their numbers.
func TestReplayGroups(t *testing.T) {
	r := NewReplay(NewState(world(t, proposed), ""))
	readAll(t, r.Add,
		"deny/no-rule I 10.0.0.6=shop/six 10.0.0.2=shop/db-0 TCP 5432",
		"allow/rule I 203.0.113.10 10.0.0.2=shop/db-0 TCP 5432 2",
		"allow/rule I 203.0.113.9 10.0.0.2=shop/db-0 TCP 5432",
		"allow/rule I 203.0.113.10 10.0.0.2=shop/db-0 TCP 5432 5",
		"allow/rule I 203.0.113.10 10.0.0.2=shop/db-0 TCP 53",
		"allow/rule I 203.0.113.10 10.0.0.2=shop/db-0 UDP 53",
		"allow/rule I 203.0.113.10 10.0.0.2=shop/db-0 ICMP 8",
	)
	var got []string
	for _, c := range r.Report().Changes {
		got = append(got, fmt.Sprint(c.Proposed.Verdict, " ", c.From, " ", c.service(), " ", c.Connections))
	}
	want := []string{"deny 203.0.113.9 TCP 5432 1", "deny 203.0.113.10 ICMP 1", "deny 203.0.113.10 TCP 53 1", "deny 203.0.113.10 TCP 5432 7", "deny 203.0.113.10 UDP 53 1", "allow shop/six TCP 5432 1"}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

func TestReportText(t *testing.T) {
	r := Report{Connections: 20, StandIns: 2, AuditOnly: 3}
	for i := range 12 {
		r.NotPlaced = append(r.NotPlaced, NotPlaced{fmt.Sprint("reason ", i), 1})
	}
	var b strings.Builder
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"20 connections: 0 would be denied, 0 would be allowed, 0 unchanged, 20 can't be judged\n", "gone: 2\n", "audit-only mode alone: 3\n", "1, reason 9\n", "for other reasons: 2\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q lacks %q", b.String(), want)
		}
	}
}

// TestReplayAuditOnly: what passed in audit-only mode and is denied by policy, then
// and in the proposed state, in whatever mode, is no change, and is counted.
func TestReplayAuditOnly(t *testing.T) {
	for _, mode := range []string{"", "audit-only"} {
		o := world(t, proposed)
		o.Namespaces["shop"] = &policycache.Namespace{Name: "shop", Mode: mode}
		r := NewReplay(NewState(o, ""))
		readAll(t, r.Add, "would-deny/no-rule I 203.0.113.9 10.0.0.2=shop/db-0 TCP 5432 4", "allow/rule I 203.0.113.9 10.0.0.2=shop/db-0 TCP 5432 2")
		report := r.Report()
		if report.AuditOnly != 4 || report.Unchanged != 4 || report.Denied != 2 {
			t.Errorf("mode %q: %+v", mode, report)
		}
		if want := map[string]string{"": "deny", "audit-only": "would-deny"}[mode]; report.Changes[0].Proposed.Verdict != want {
			t.Errorf("mode %q: proposed %+v", mode, report.Changes[0].Proposed)
		}
	}
}

// A stand-in must be of a workload, and named as its pods are.
func TestStandIn(t *testing.T) {
	w := newWorkloads(world(t, `
pod a/web-7d4b9c6f5d-x2x1z 10.0.0.1 pod-template-hash=7d4b9c6f5d
pod a/web-7d4b9c6f5d-a 10.0.0.2 pod-template-hash=7d4b9c6f5d
pod a/log-bcdfg 10.0.0.3 controller-revision-hash=1
pod a/db-1 10.0.0.4 statefulset.kubernetes.io/pod-name=db-1
pod a/plain-0 10.0.0.5 app=plain
`))
	for name, want := range map[string]string{
		"web-5d7d4b9c6f-zzzzz": "a/web-7d4b9c6f5d-x2x1z", "web": "", "web-zzzzz": "", "web-5d7d4b9c6f-eeeee": "",
		"log-zzzzz": "a/log-bcdfg", "db-0": "a/db-1", "plain-1": "", "other-0": "",
	} {
		if got := w.standIn("a", name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		if got := w.standIn("b", name); got != "" {
			t.Errorf("%s of another namespace: got %q", name, got)
		}
	}
}

// Pods without an address of their own get one that nobody has, and objects as
// they were given aren't touched.
func TestSettled(t *testing.T) {
	o := world(t, "pod a/x 240.0.0.1,100::2\npod a/y -\npod a/z 10.0.0.1 phase=Failed\npod a/h - host=true")
	all := settled(o)
	for key, want := range map[string]string{"a/x": "[240.0.0.1 100::2]", "a/y": "[240.0.0.2 100::1]", "a/z": "[240.0.0.3 100::3]", "a/h": "[]"} {
		if got := fmt.Sprint(all.Pods[key].IPs); got != want {
			t.Errorf("%s: got %s, want %s", key, got, want)
		}
	}
	if len(o.Pods["a/y"].IPs) != 0 || o.Pods["a/z"].Phase != "Failed" || all.Pods["a/z"].Ended() {
		t.Error("a finished pod must be taken as it was, and the objects stay as they were")
	}
}
