package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/bench/lab"
)

const revokeFrom = `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: other}}}, %s]}]}`

// TestChangesCutOpenConnections changes policy, pod labels, a namespace's labels and
// the pods themselves under open connections of all kinds: those that are no longer
// allowed stop within a second, both ways, and go on when they are allowed again; the
// others go on throughout, and those that a change doesn't concern aren't even looked
// at.
func TestChangesCutOpenConnections(t *testing.T) {
	t.Parallel()
	bothModes(t, "changes", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		w.lab.AddNamespace("c", labelMap("team=one"))
		w.pod(mode, "a/web", 11, "app=web")
		w.pod(mode, "a/db", 12, "app=db")
		w.pod(mode, "a/other", 13, "app=other")
		w.pod(mode, "c/far", 14, "")
		w.pod(mode, "b/x", 15, "")
		w.pod(mode, "b/y", 16, "")
		toWeb, toTeam := fmt.Sprintf(revokeFrom, `{podSelector: {matchLabels: {app: web}}}`), fmt.Sprintf(revokeFrom, `{namespaceSelector: {matchLabels: {team: one}}}`)
		w.apply("db.yaml", policy("a/db", toWeb)+"---\n"+policy("a/team", toTeam))
		w.start()
		db, y := w.servePulses("a/db"), w.servePulses("b/y")
		bystanders := append(db.pulses("a/other", "a/db"), y.pulses("b/x", "b/y")...)
		pods := func(from, to string) func() {
			return func() {
				w.edit("lab-pods.yaml", func(o string) string { return strings.ReplaceAll(o, from, to) })
			}
		}
		for _, c := range []struct {
			what, client  string
			change, again func()
			by            string // the policy that is to be named
			changed       string // whose meaning changes
		}{
			{"the policy changed", "a/web",
				func() {
					w.apply("db.yaml", policy("a/db", fmt.Sprintf(revokeFrom, `{ipBlock: {cidr: 1.2.3.4/32}}`))+"---\n"+policy("a/team", toTeam))
				},
				func() { w.apply("db.yaml", policy("a/db", toWeb)+"---\n"+policy("a/team", toTeam)) }, "a/db", "a/db"},
			{"the client was isolated", "c/far",
				func() { w.apply("out.yaml", policy("c/out", `{podSelector: {}, policyTypes: [Egress]}`)) },
				func() { w.remove("out.yaml") }, "c/out", "c/far"},
			{"the client was relabelled", "a/web", pods("app: web\n", "app: none\n"), pods("app: none\n", "app: web\n"), "a/db", "a/web"},
			{"the client's namespace was relabelled", "c/far",
				func() {
					w.edit("lab-namespaces.yaml", func(o string) string { return strings.ReplaceAll(o, "team: one", "team: two") })
				},
				func() {
					w.edit("lab-namespaces.yaml", func(o string) string { return strings.ReplaceAll(o, "team: two", "team: one") })
				}, "a/team", "c/far"},
			{"the client was gone", "a/web",
				func() {
					w.edit("lab-pods.yaml", func(o string) string {
						if strings.Contains(o, "name: web\n") {
							return ""
						}
						return o
					})
				},
				func() { w.must(w.lab.Manifests(w.dir)) }, "a/db", "a/web"},
		} {
			concerned := db.pulses(c.client, "a/db")
			w.stillness()
			before, revoked := w.metric("portcullis_rejudged_connections_total"), w.metric("portcullis_revoked_connections_total")
			flows := w.flowsOf(c.changed) // the kernel is made to forget those of a pod that has gone
			change := time.Now()
			c.change()
			w.stopped(concerned, change, c.what)
			w.beating(bystanders, change.Add(1500*time.Millisecond), c.what)
			if n := w.metric("portcullis_revoked_connections_total") - revoked; int(n) < len(concerned) {
				t.Errorf("%s: %v of %d connections were revoked", c.what, n, len(concerned))
			}
			most := 2 * max(flows, w.flowsOf(c.changed)) // for each change is looked at twice
			if n := w.metric("portcullis_rejudged_connections_total") - before; int(n) < len(concerned) || int(n) > most {
				t.Errorf("%s: %v connections were judged, of %d concerned, %d at most", c.what, n, len(concerned), most)
			}
			w.tellsOfRevoked(c.what, c.client, c.by, len(concerned), change)
			again := time.Now()
			c.again()
			w.beating(concerned, again.Add(100*time.Millisecond), c.what+", and back again")
		}
		if n := w.flows(func(entry string) bool {
			return strings.Contains(entry, "mark=8192 ") || strings.Contains(entry, "mark=12288 ")
		}); n != 0 {
			t.Errorf("%d connections are still marked as revoked", n)
		}
	})
}

// stillness waits until the agent has nothing to judge anew.
func (w *world) stillness() {
	w.Helper()
	last, since := -1.0, time.Now()
	w.until("no connections are judged anew", func() error {
		if looks := w.metric("portcullis_rejudge_duration_seconds_count"); looks != last {
			last, since = looks, time.Now()
		}
		if time.Since(since) < 600*time.Millisecond {
			return errNotYet
		}
		return nil
	})
}

// flowsOf counts the connections from and to somebody.
func (w *world) flowsOf(who string) int {
	w.Helper()
	return w.flows(func(entry string) bool {
		return slices.ContainsFunc(w.lab.IPs(who), func(ip netip.Addr) bool { return strings.Contains(entry, "="+ip.String()+" ") })
	})
}

// tellsOfRevoked waits until the decision log has n revoked connections of a client,
// by a policy, since then.
func (w *world) tellsOfRevoked(what, client, by string, n int, since time.Time) {
	w.Helper()
	w.until("the log tells of what was revoked when "+what, func() error {
		found := 0
		for _, d := range w.decisions() {
			if d.Verdict != "revoked" || d.Time.Before(since) || d.Dst.Pod != "db" {
				continue
			}
			ip := w.lab.IP4(client).String()
			if d.Src.IP != ip && d.Src.IP != w.lab.IP6(client).String() || d.Reason != "no-rule" || d.Generation == 0 {
				return fmt.Errorf("an unexpected record: %+v", d)
			}
			for _, s := range []*side{d.Egress, d.Ingress} {
				if s != nil && s.Verdict == "deny" && slices.Contains(s.Policies, by) {
					found++
				}
			}
		}
		if found < n {
			return fmt.Errorf("%d of %d, by %s", found, n, by)
		}
		return nil
	})
}
