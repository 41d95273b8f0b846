package policycache_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/policycache"
	"portcullis/policycache/explain"
	"portcullis/verdict"
)

// changeLine is a change as explain -o json has it.
type changeLine struct {
	Direction, Why, Policy, Note string
	Patch                        json.RawMessage
	Create                       json.RawMessage
}

// changesOf asks for the changes as a user does, in JSON.
func changesOf(t *testing.T, c *explain.Cluster, a *explain.Answer) []changeLine {
	t.Helper()
	var b bytes.Buffer
	if err := c.WriteJSON(&b, a); err != nil {
		t.Fatal(err)
	}
	var answer struct{ Changes []changeLine }
	if err := json.Unmarshal(b.Bytes(), &answer); err != nil {
		t.Fatal(err)
	}
	return answer.Changes
}

// applied makes a change in a state, as kubectl would.
func applied(t *testing.T, o *policycache.Objects, c changeLine) *policycache.Objects {
	t.Helper()
	o = clone(o, false)
	var p networkingv1.NetworkPolicy
	before := o.Policies[c.Policy]
	if len(c.Create) > 0 {
		if before != nil || c.Patch != nil {
			t.Fatalf("%s is there already, or a patch too: %s", c.Policy, c.Patch)
		}
		if err := json.Unmarshal(c.Create, &p); err != nil {
			t.Fatal(err)
		}
	} else {
		patch, err := jsonpatch.DecodePatch(c.Patch)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		if text, err = patch.Apply(text); err != nil {
			t.Fatalf("%s: %v", c.Patch, err)
		}
		if err := json.Unmarshal(text, &p); err != nil {
			t.Fatal(err)
		}
	}
	o.Policies[c.Policy] = &p
	return o
}

// TestChangesAdmit holds on random clusters that what explain proposes admits the
// connection, that it takes nothing away, and that it admits no more than it says: no
// other port, and none but the other end's like, or the peers of the rule that is
// given the port.
func TestChangesAdmit(t *testing.T) {
	count := map[string]int{}
	for seed := *seedFlag; seed < *seedFlag+*clustersFlag/8; seed++ {
		d := newDice(seed)
		o := d.cluster()
		snapshot := policycache.NewCompiler("", quiet).Compile(o)
		cluster := explain.New(o, snapshot, "")
		flows := admissible(d.flows(o, 60))
		for _, f := range flows {
			a := explain.Answer{Flow: f, Decision: snapshot.Decide(&f)}
			if a.Decision.Reason != verdict.ReasonNoRule {
				if c := cluster.Changes(&a); c != nil {
					t.Fatalf("-seed %d: %+v is %s, and changes are proposed: %+v", seed, f, a.Decision.Reason, c)
				}
				continue
			}
			after := o
			for _, c := range changesOf(t, cluster, &a) {
				before := after
				after = applied(t, after, c)
				if bad := admitsMore(before, after, c, f, flows, count); bad != "" {
					t.Fatalf("-seed %d: %+v (%v -> %v): %+v\n%s %s: %s\n%s", seed, f, f.Src, f.Dst, c, c.Patch, c.Create, bad, dump(before))
				}
			}
			if got := policycache.NewCompiler("", quiet).Compile(after).Decide(&f); got.Verdict != verdict.Allow {
				t.Fatalf("-seed %d: %+v (%v -> %v) is still denied: %+v\n%s\n%s", seed, f, f.Src, f.Dst, got, dump(o), dump(after))
			}
			count["admitted"]++
		}
	}
	for _, kind := range []string{"admitted", "peer", "port", "rule", "policy", "more flows of the same kind"} {
		if count[kind] < 20 {
			t.Errorf("%s: only %d, too few to tell: %v", kind, count[kind], count)
		}
	}
}

// admitsMore compares two states, between which there is one change made for a flow,
// by the oracle. It gives what is wrong, "" if nothing is.
func admitsMore(before, after *policycache.Objects, c changeLine, f verdict.Flow, flows []verdict.Flow, count map[string]int) string {
	added := kindOf(c)
	count[added]++
	for _, g := range flows {
		old, now := oracle(before, "", g), oracle(after, "", g)
		if old.Verdict == verdict.Allow && now.Verdict != verdict.Allow {
			return fmt.Sprintf("%+v was allowed", g)
		}
		if sideOf(old, c.Direction).Verdict == sideOf(now, c.Direction).Verdict {
			continue
		}
		count["more flows of the same kind"]++
		samePort := g.Proto == f.Proto && g.DstPort == f.DstPort
		if f.Proto.HasPorts() && !samePort && !namesPorts(before, c) {
			return fmt.Sprintf("%+v (%v -> %v) is admitted, by another port", g, g.Src, g.Dst)
		}
		if !samePeer(before, c, f, g) && added != "port" {
			return fmt.Sprintf("%+v (%v -> %v) is admitted, from another peer", g, g.Src, g.Dst)
		}
		if added == "port" && !peerOfRule(before, c, g) {
			return fmt.Sprintf("%+v (%v -> %v) is admitted, which is no peer of the rule", g, g.Src, g.Dst)
		}
	}
	return ""
}

func kindOf(c changeLine) string {
	switch {
	case c.Create != nil:
		return "policy"
	case strings.Contains(string(c.Patch), `/from/-"`), strings.Contains(string(c.Patch), `/to/-"`):
		return "peer"
	case strings.Contains(string(c.Patch), `/ports/-"`):
		return "port"
	}
	return "rule"
}

func sideOf(a answer, direction string) answerSide {
	if direction == "egress" {
		return a.Egress
	}
	return a.Ingress
}

// ruleOf gives the rule that a patch adds to, and its policy's namespace.
func ruleOf(o *policycache.Objects, c changeLine) (r oracleRule, namespace string, ok bool) {
	var patch []struct{ Path string }
	if json.Unmarshal(c.Patch, &patch) != nil || len(patch) != 1 {
		return r, "", false
	}
	var index int
	if _, err := fmt.Sscanf(patch[0].Path, "/spec/"+c.Direction+"/%d/", &index); err != nil {
		return r, "", false
	}
	direction := ingress
	if c.Direction == "egress" {
		direction = egress
	}
	p := o.Policies[c.Policy]
	return oracleRules(p, direction)[index], p.Namespace, true
}

// namesPorts tells whether the rule that is added to has ports by name, which are other
// numbers elsewhere.
func namesPorts(o *policycache.Objects, c changeLine) bool {
	r, _, ok := ruleOf(o, c)
	return ok && slices.ContainsFunc(r.ports, func(p networkingv1.NetworkPolicyPort) bool { return p.Port != nil && p.Port.StrVal != "" })
}

// samePeer tells whether the flow's other end is the one asked about, or a pod of its
// namespace that has its labels.
func samePeer(o *policycache.Objects, c changeLine, f, g verdict.Flow) bool {
	asked, got := f.Src, g.Src
	if c.Direction == "egress" {
		asked, got = f.Dst, g.Dst
	}
	a, b := oracleOwner(o, asked), oracleOwner(o, got)
	if a == nil || b == nil {
		return asked == got
	}
	for key, value := range a.Labels {
		if has, ok := b.Labels[key]; !ok || has != value {
			return false
		}
	}
	return a.Namespace == b.Namespace
}

// peerOfRule tells whether the flow's other end is a peer of the rule that is added to.
func peerOfRule(o *policycache.Objects, c changeLine, g verdict.Flow) bool {
	r, namespace, ok := ruleOf(o, c)
	peer := g.Src
	if c.Direction == "egress" {
		peer = g.Dst
	}
	return ok && slices.ContainsFunc(r.peers, func(p networkingv1.NetworkPolicyPeer) bool {
		return oraclePeerMatches(o, namespace, p, oracleOwner(o, peer), peer)
	})
}
