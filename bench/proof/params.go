package proof

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Params say how much is measured.
type Params struct {
	Rounds     int           // how often each variant is measured
	Connects   int           // one after the other, for latency
	Datagrams  int           // one after the other, for the first packet's latency
	Flood      time.Duration // of each measurement of connections per second
	Stream     time.Duration // of each measurement of throughput
	Clients    int           // that connect at once
	Pairs      int           // of pods, where there are many
	Pods       int           // of the cluster around
	Policies   []int         // numbers of policies that latency should not depend on
	OnPod      []int         // numbers of policies on the measured pods, for iptables too
	Changes    int           // of one policy, measured alone, in each direction
	Rate       int           // changes per second, for reaction
	Reactions  int           // changes at that rate
	Variants   string        // "all", "tune", or names with commas between
	Microbench string        // -benchtime of the microbenchmarks for the budget
	Nice       int           // of all that is measured; below 0 on a machine with other work
}

// ParamsFromEnv gives the defaults, which take a few minutes, changed by
// variables such as PROOF_ROUNDS. A variable that is no parameter is an error.
func ParamsFromEnv() (Params, error) {
	p := Params{
		Rounds: 5, Connects: 1000, Datagrams: 300, Flood: 300 * time.Millisecond, Stream: 500 * time.Millisecond,
		Clients: 32, Pairs: 50, Pods: 10_000, Policies: []int{10, 1_000, 10_000}, OnPod: []int{10, 100, 1_000},
		Changes: 3, Rate: 50, Reactions: 300, Variants: "all", Microbench: "0.2s",
	}
	fields := map[string]any{
		"ROUNDS": &p.Rounds, "CONNECTS": &p.Connects, "DATAGRAMS": &p.Datagrams, "FLOOD": &p.Flood, "STREAM": &p.Stream,
		"CLIENTS": &p.Clients, "PAIRS": &p.Pairs, "PODS": &p.Pods, "POLICIES": &p.Policies, "ON_POD": &p.OnPod,
		"CHANGES": &p.Changes, "RATE": &p.Rate, "REACTIONS": &p.Reactions, "VARIANTS": &p.Variants, "MICROBENCH": &p.Microbench, "NICE": &p.Nice,
	}
	for _, entry := range os.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		name, ours := strings.CutPrefix(name, "PROOF_")
		if !ours || name == "OUT" || value == "" {
			continue
		}
		field, known := fields[name]
		if !known {
			return p, fmt.Errorf("PROOF_%s is no parameter", name)
		}
		if err := set(field, value); err != nil {
			return p, fmt.Errorf("PROOF_%s=%s: %w", name, value, err)
		}
	}
	return p, p.check()
}

func set(field any, value string) (err error) {
	switch f := field.(type) {
	case *int:
		*f, err = strconv.Atoi(value)
	case *time.Duration:
		*f, err = time.ParseDuration(value)
	case *string:
		*f = value
	case *[]int:
		*f = nil
		for word := range strings.SplitSeq(value, ",") {
			n, err := strconv.Atoi(word)
			if err != nil {
				return err
			}
			*f = append(*f, n)
		}
	}
	return err
}

// check refuses what can't be measured, or would never end.
func (p Params) check() error {
	for _, n := range []int{p.Rounds, p.Connects, p.Datagrams, p.Clients, p.Pairs, p.Pods, p.Rate, int(p.Flood), int(p.Stream)} {
		if n < 1 {
			return errors.New("every number but those of changes must be at least 1")
		}
	}
	for _, n := range append(p.Policies, p.OnPod...) {
		if n < 1 {
			return errors.New("at least one policy must admit the clients")
		}
	}
	if p.Pairs > 250 || p.Clients > 256 {
		return errors.New("at most 250 pairs and 256 clients")
	}
	return nil
}

// wantsAPI tells whether an agent on an API server is measured too.
func (p Params) wantsAPI() bool {
	return p.Variants == "all" || slices.Contains(strings.Split(p.Variants, ","), apiName)
}

// spread is a cluster with so many policies, a few of which are on the measured pods.
func (p Params) spread(policies int) clusterSpec {
	onPod := min(onPodAlways, policies)
	return clusterSpec{onPod: onPod, elsewhere: policies - onPod, pods: p.Pods}
}
