package policycache_test

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"portcullis/policycache"
	"portcullis/verdict"
)

var (
	seedFlag     = flag.Uint64("seed", 1, "the first random cluster's seed")
	clustersFlag = flag.Uint64("clusters", 2000, "how many random clusters to compare, each with the next seed")
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// disagreement is one flow about which engine and oracle differ.
type disagreement struct {
	what      string
	node      string
	flow      verdict.Flow
	got, want any
}

// String writes a flow so that a failure can be read without its types.
func (d *disagreement) String() string {
	return fmt.Sprintf("%s, node %q, flow %+v (%v -> %v %v):\n got  %+v\n want %+v", d.what, d.node, d.flow, d.flow.Src, d.flow.Dst, d.flow.Proto, d.got, d.want)
}

// rig is one compiler and one engine with its workers, which live through a
// sequence of states as they do in an agent.
type rig struct {
	node     string
	compiler *policycache.Compiler
	engine   *verdict.Engine
	workers  []*verdict.Worker
	hits     int
}

// newRig has a worker with a cache that holds everything, one whose cache is
// always too small, and one without.
func newRig(node string) *rig {
	r := &rig{node: node, compiler: policycache.NewCompiler(node, quiet), engine: verdict.NewEngine()}
	for _, size := range []int{4096, 3, 0} {
		r.workers = append(r.workers, r.engine.NewWorker(size))
	}
	return r
}

// check compiles a state, swaps it in and compares everything that can be asked.
func (r *rig) check(d *dice, o *policycache.Objects, flows []verdict.Flow) *disagreement {
	s := r.compiler.Compile(o)
	r.engine.Swap(s)
	if bad := r.checkState(s, o); bad != nil {
		return bad
	}
	wants := make([]answer, len(flows))
	for i, f := range flows {
		wants[i] = oracle(o, r.node, f)
		plain := s.Decide(&f)
		if got := answerOf(&plain); got != wants[i] {
			return &disagreement{"uncached", r.node, f, got, wants[i]}
		}
	}
	for range 2 * len(flows) {
		i := d.n(len(flows))
		f := flows[i]
		if f.Proto.HasPorts() {
			f.SrcPort += uint16(d.n(2))
		}
		for _, w := range r.workers {
			got := w.Decide(&f)
			if a := answerOf(got); a != wants[i] {
				return &disagreement{fmt.Sprintf("worker, cached %v", got.Cached), r.node, f, a, wants[i]}
			}
			if got.Cached {
				r.hits++
			}
		}
	}
	return nil
}

// checkState compares what a snapshot says without being asked about a flow.
func (r *rig) checkState(s *verdict.Snapshot, o *policycache.Objects) *disagreement {
	addrs := slices.Clone(s.IsolatedAddrs())
	slices.SortFunc(addrs, netip.Addr.Compare)
	if want := oracleIsolatedAddrs(o, r.node); !slices.Equal(addrs, want) {
		return &disagreement{what: "IsolatedAddrs", node: r.node, got: addrs, want: want}
	}
	reported, others := map[string]bool{}, false
	for _, p := range r.compiler.Problems() {
		if key, ok := strings.CutPrefix(p.Object, "networkpolicy "); ok {
			reported[key] = true
		} else {
			others = true
		}
	}
	for key, p := range o.Policies {
		if want := oracleInvalid(p); reported[key] != want {
			return &disagreement{what: "Problems of " + key, node: r.node, got: r.compiler.Problems(), want: want}
		}
	}
	if want := oracleDoubled(o); others != want {
		return &disagreement{what: "Problems with addresses", node: r.node, got: r.compiler.Problems(), want: want}
	}
	return nil
}

// story runs one seed: a cluster, its flows, and a few changes, through some of
// which an earlier state comes back.
func story(d *dice, steps, flowCount int) (hits int, o *policycache.Objects, bad *disagreement) {
	o = d.cluster()
	flows := d.flows(o, flowCount)
	r := newRig(pick(d, "", "", "n1", "n2"))
	states := []*policycache.Objects{o}
	for range steps {
		if bad = r.check(d, o, flows); bad != nil {
			return r.hits, o, bad
		}
		if d.pct(15) {
			o = pick(d, states...)
		} else {
			o = d.mutate(o)
		}
		states = append(states, o)
		flows[d.n(len(flows))] = d.flow(o)
	}
	return r.hits, o, nil
}

// TestCompiledVersusOracle compares the compiled engine with the oracle. A
// failure names its seed; -seed N -clusters 1 runs that one again, and -clusters
// makes it a longer hunt.
func TestCompiledVersusOracle(t *testing.T) {
	const shards = 4
	for shard := range uint64(shards) {
		t.Run(fmt.Sprint(shard), func(t *testing.T) {
			t.Parallel()
			hits, asked := 0, false
			for seed := *seedFlag + shard; seed < *seedFlag+*clustersFlag; seed += shards {
				d := newDice(seed)
				d.modes = seed%2 == 0
				n, o, bad := story(d, 6, 12)
				if bad != nil {
					report(t, fmt.Sprintf("-seed %d -clusters 1", seed), o, bad)
				}
				hits, asked = hits+n, true
			}
			if asked && hits == 0 {
				t.Error("no decision came from a cache: the caches weren't tried")
			}
		})
	}
}

// TestManyRules compares where tables outgrow a machine word, or several, and
// where hardly any two selectors are the same.
func TestManyRules(t *testing.T) {
	for _, rules := range []int{63, 64, 65, 128, 129, 300, 700} {
		t.Run(fmt.Sprint(rules), func(t *testing.T) {
			t.Parallel()
			d := newDice(uint64(rules))
			o := d.crowd(rules)
			flows := d.flows(o, 40)
			r := newRig("")
			if bad := r.check(d, o, flows); bad != nil {
				report(t, t.Name(), o, bad)
			}
			next := d.mutate(o)
			if bad := r.check(d, next, flows); bad != nil {
				report(t, t.Name()+" after a change", next, bad)
			}
		})
	}
}

// TestLongLife drives one compiler through a life in which every step brings
// policies with selectors never seen before: what it remembers of those that
// are gone must neither mislead it nor stay for ever.
func TestLongLife(t *testing.T) {
	d, r := newDice(7), newRig("")
	o := d.cluster()
	for step := range 80 {
		next := clone(o, false)
		ns := pick(d, genNamespaces...)
		p := d.policy(ns, "pol0")
		p.Spec.PodSelector, p.Spec.PolicyTypes = metav1.LabelSelector{}, []networkingv1.PolicyType{ingress, egress}
		for i := range 30 {
			one := metav1.LabelSelectorRequirement{Key: pick(d, genKeys...), Operator: metav1.LabelSelectorOpIn, Values: []string{pick(d, genValues...), fmt.Sprintf("s%d-%d", step, i)}}
			peer := networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{one}}}
			if d.pct(50) {
				peer.NamespaceSelector = d.selector()
			}
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: d.crowdPorts(), From: []networkingv1.NetworkPolicyPeer{peer}})
		}
		next.Policies[ns+"/pol0"] = p
		o = d.mutate(next)
		if bad := r.check(d, o, d.flows(o, 10)); bad != nil {
			report(t, fmt.Sprintf("step %d", step), o, bad)
		}
	}
}

// crowd draws a cluster in which every pod is under the same two policies, the
// second of which has that many rules each way, most with a selector or a port
// of their own.
func (d *dice) crowd(rules int) *policycache.Objects {
	o := d.cluster()
	for key, p := range o.Pods {
		q := *p
		q.Labels = maps.Clone(q.Labels)
		q.Labels["one-of"] = fmt.Sprintf("v%d", d.n(rules))
		o.Pods[key] = &q
	}
	for _, ns := range genNamespaces {
		few, many := d.policy(ns, "few"), &networkingv1.NetworkPolicy{}
		few.Spec.PodSelector = metav1.LabelSelector{}
		many.Namespace, many.Name = ns, "many"
		many.Spec.PolicyTypes = []networkingv1.PolicyType{ingress, egress}
		for i := range rules {
			many.Spec.Ingress = append(many.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: d.crowdPorts(), From: d.crowdPeers(i)})
			many.Spec.Egress = append(many.Spec.Egress, networkingv1.NetworkPolicyEgressRule{Ports: d.crowdPorts(), To: d.crowdPeers(i)})
		}
		o.Policies[ns+"/few"], o.Policies[ns+"/many"] = few, many
	}
	return o
}

func (d *dice) crowdPorts() []networkingv1.NetworkPolicyPort {
	port := intstr.FromInt32(int32(pick(d, genPorts...)))
	return append(d.ports(), networkingv1.NetworkPolicyPort{Port: &port})
}

// crowdPeers gives mostly selectors that at most a pod or two satisfy, so that
// it matters which of the many rules is the first that allows.
func (d *dice) crowdPeers(i int) []networkingv1.NetworkPolicyPeer {
	one := &metav1.LabelSelector{MatchLabels: map[string]string{"one-of": fmt.Sprintf("v%d", i)}}
	p := networkingv1.NetworkPolicyPeer{PodSelector: one}
	switch d.n(8) {
	case 0:
		p.NamespaceSelector = &metav1.LabelSelector{}
	case 1:
		p.NamespaceSelector = d.selector()
	case 2:
		p = networkingv1.NetworkPolicyPeer{IPBlock: d.block()}
	}
	return []networkingv1.NetworkPolicyPeer{p}
}

// FuzzCompiledVersusOracle lets a fuzzer choose what the generator chooses: its
// bytes are the dice's throws, and the seed goes on where they end.
func FuzzCompiledVersusOracle(f *testing.F) {
	f.Add(uint64(1), []byte{})
	f.Add(uint64(2), []byte("\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, seed uint64, throws []byte) {
		d := newDice(seed)
		d.bytes = throws
		if _, o, bad := story(d, 3, 8); bad != nil {
			report(t, fmt.Sprintf("seed %d, throws %x", seed, throws), o, bad)
		}
	})
}
