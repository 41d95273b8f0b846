package proof

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"portcullis/filter"
)

// kind is what stands between the pods.
type kind int

const (
	noFilter      kind = iota
	conntrackOnly      // the agent's chains, RETURN for NFQUEUE
	bareEcho           // the agent's chains, and our echo at the queues
	callbackEcho       // the same, and go-nfqueue's callback
	agentKind          // Portcullis
	chainsKind         // iptables and ipset, as kube-router
)

// variant is one of the things that are measured side by side.
type variant struct {
	name    string
	kind    kind
	about   string
	cluster clusterSpec
	args    []string // of the agent or the echo
	env     []string // of its process
	log     bool     // the agent's decision log, into a file
	fanout  bool     // the echo's queue is the packet's CPU's, not its addresses'
}

// policies is how many the variant's cluster has.
func (v variant) policies() int { return v.cluster.onPod + v.cluster.elsewhere }

// onPodAlways is how many policies select the measured pods where the number of
// policies is elsewhere.
const onPodAlways = 10

// The variants that targets and ratios speak of.
const (
	none       = "none"
	conntrack  = "conntrack"
	echoName   = "echo"
	pinnedName = "echo-pinned"
	callback   = "callback"
)

func agentName(policies int) string  { return fmt.Sprint("portcullis-", policies) }
func onPodName(policies int) string  { return fmt.Sprint("portcullis-pod-", policies) }
func missName(policies int) string   { return fmt.Sprint("portcullis-miss-", policies) }
func chainsName(policies int) string { return fmt.Sprint("iptables-", policies) }

const (
	logName   = "portcullis-log"
	noisyName = "portcullis-noisy"
)

// proofVariants are what the proof compares.
func proofVariants(p Params) []variant {
	plain := clusterSpec{onPod: onPodAlways}
	all := []variant{
		{name: none, kind: noFilter, about: "(a) no rules at all"},
		{name: conntrack, kind: conntrackOnly, about: "(b) the agent's chains with RETURN in place of NFQUEUE", cluster: plain},
		{name: echoName, kind: bareEcho, about: "(c) the agent's chains, and a bare loop that accepts", cluster: plain},
		{name: pinnedName, kind: bareEcho, about: "(c′) the same loop, each CPU's packets read on that CPU, as Portcullis does", cluster: plain, args: []string{"--pin"}, fanout: true},
		{name: callback, kind: callbackEcho, about: "(d) the same by go-nfqueue's callback", cluster: plain},
	}
	for _, n := range p.Policies {
		all = append(all, variant{name: agentName(n), kind: agentKind, cluster: p.spread(n),
			about: fmt.Sprintf("(e) Portcullis, %d policies in the cluster, %d of them on the pod; cache hits", n, min(onPodAlways, n))})
	}
	for _, n := range []int{p.Policies[0], p.Policies[len(p.Policies)-1]} {
		all = append(all, variant{name: missName(n), kind: agentKind, cluster: p.spread(n), args: []string{"--cache-size", "0"},
			about: fmt.Sprintf("(e) the same with %d policies and no cache: every decision a miss", n)})
	}
	all = append(all, variant{name: logName, kind: agentKind, cluster: p.spread(p.Policies[0]), log: true,
		about: fmt.Sprintf("(e) with %d policies, and the decision log written to a file", p.Policies[0])})
	all = append(all, variant{name: noisyName, kind: agentKind, cluster: p.spread(p.Policies[0]), args: []string{"--noisy-rate", strconv.Itoa(filter.DefaultNoisyRate)},
		about: fmt.Sprintf("(e) with %d policies and the usual --noisy-rate, %d connections a second, which these loads are beyond: one worker of the lowest priority judges them. The others have it at %s", p.Policies[0], filter.DefaultNoisyRate, noNoise)})
	for _, n := range p.OnPod {
		spec := clusterSpec{onPod: n, pods: p.Pods}
		if !slices.ContainsFunc(all, func(v variant) bool { return v.kind == agentKind && v.cluster == spec && v.args == nil && !v.log }) {
			all = append(all, variant{name: onPodName(n), kind: agentKind, cluster: spec,
				about: fmt.Sprintf("(e) Portcullis, %d policies, all on the pod", n)})
		}
		all = append(all, variant{name: chainsName(n), kind: chainsKind, cluster: clusterSpec{onPod: n},
			about: fmt.Sprintf("(f) kube-router's chains and sets for %d policies, all on the pod", n)})
	}
	return slices.CompactFunc(all, func(a, b variant) bool { return a.name == b.name })
}

// tuneVariants are what was tried for the packet's path: each the bare echo or
// the agent with one thing changed.
func tuneVariants(p Params) []variant {
	cluster := clusterSpec{onPod: onPodAlways}
	all := []variant{
		{name: none, kind: noFilter, about: "no rules at all"},
		{name: conntrack, kind: conntrackOnly, about: "the agent's chains with RETURN in place of NFQUEUE", cluster: cluster},
		{name: echoName, kind: bareEcho, about: "the bare echo", cluster: cluster},
		{name: callback, kind: callbackEcho, about: "go-nfqueue's callback", cluster: cluster},
	}
	tryEcho := func(name, about string, args ...string) {
		all = append(all, variant{name: "echo-" + name, kind: bareEcho, about: "the echo, " + about, cluster: cluster, args: args})
	}
	tryEcho("again", "answering as the agent does: a mark, and once more through the hook", "--again")
	tryEcho("batch", "one batch verdict for what is there", "--batch")
	tryEcho("together", "recvmmsg, and all verdicts in one write", "--together")
	tryEcho("raw", "writing past Go's scheduler", "--raw")
	tryEcho("yield", "yielding to Go's scheduler every 2 ms", "--yield")
	tryEcho("yield-raw", "yielding, and writing past the scheduler", "--yield", "--raw")
	tryEcho("spin20", "asking for 20 µs before it blocks", "--spin", "20us")
	tryEcho("spin100", "asking for 100 µs before it blocks", "--spin", "100us")
	tryEcho("pin", "worker i on CPU i", "--pin")
	tryEcho("buffer212k", "a receive buffer of 212,992 bytes, the kernel's default", "--read-buffer", "212992")
	tryEcho("buffer64m", "a receive buffer of 64 MiB", "--read-buffer", strconv.Itoa(64<<20))
	fanOut := func(name, about string, args ...string) {
		tryEcho(name, about, args...)
		all[len(all)-1].fanout = true
	}
	fanOut("fanout", "each CPU's packets to one queue (--queue-cpu-fanout)")
	fanOut("fanout-pin", "the same, and worker i on CPU i", "--pin")
	fanOut("fanout-pin-yield", "the same, yielding every 2 ms on its locked thread", "--pin", "--yield")
	fanOut("fanout-pin-together", "pinned so, with recvmmsg and all verdicts in one write", "--pin", "--together")
	fanOut("fanout-pin-together-slice", "the same, with time slices of 0.1 ms", "--pin", "--together", "--slice", "100us")
	for _, n := range []int{1, 4} {
		all = append(all, variant{name: fmt.Sprint("echo-workers", n), kind: bareEcho, cluster: cluster,
			about: fmt.Sprintf("the echo, %d queues and workers", n), args: []string{"--queues", strconv.Itoa(n)}})
	}
	tryAgent := func(name, about string, env []string, args ...string) {
		all = append(all, variant{name: "agent" + name, kind: agentKind, about: "Portcullis" + about, cluster: cluster, env: env, args: args})
	}
	tryAgent("", "", nil)
	tryAgent("-miss", ", no cache", nil, "--cache-size", "0")
	tryAgent("-workers1", ", 1 worker", nil, "--queues", "1")
	tryAgent("-workers4", ", 4 workers", nil, "--queues", "4")
	tryAgent("-burst1", ", each packet read and answered alone", nil, "--queue-burst", "1")
	tryAgent("-burst4", ", at most 4 packets read together", nil, "--queue-burst", "4")
	tryAgent("-burst64", ", at most 64 packets read together", nil, "--queue-burst", "64")
	tryAgent("-buffer64m", ", a receive buffer of 64 MiB", nil, "--queue-read-buffer", strconv.Itoa(64<<20))
	tryAgent("-gc-off", ", GOGC=off", []string{"GOGC=off"})
	tryAgent("-gc-100", ", GOGC=100, which is Go's own", []string{"GOGC=100"})
	tryAgent("-gc-400", ", GOGC=400", []string{"GOGC=400"})
	tryAgent("-procs4", ", GOMAXPROCS=4", []string{"GOMAXPROCS=4"})
	return append(all, variant{name: "agent-log", kind: agentKind, about: "Portcullis, decision log to a file", cluster: cluster, log: true})
}

// choose gives the variants that the parameters ask for.
func choose(p Params) ([]variant, error) {
	switch p.Variants {
	case "all":
		return proofVariants(p), nil
	case "tune":
		return tuneVariants(p), nil
	}
	known := append(proofVariants(p), tuneVariants(p)...)
	var chosen []variant
	for name := range strings.SplitSeq(p.Variants, ",") {
		if name == apiName {
			continue // it isn't measured in rounds
		}
		i := slices.IndexFunc(known, func(v variant) bool { return v.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no variant %q", name)
		}
		chosen = append(chosen, known[i])
	}
	return chosen, nil
}
