//go:build soak

package soak

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
)

// The model is the checker: a cluster of few words, whose policies are read as the
// API's text reads, one after the other and for each connection anew. It shares no
// code with the agent.

type pod struct {
	namespace, name, app string
	ip                   netip.Addr
}

func (p pod) key() string { return p.namespace + "/" + p.name }

// peer is one of a rule's from or to. A zero field isn't there.
type peer struct {
	app, env     string
	cidr, except netip.Prefix
}

type port struct {
	proto  string
	number uint16
}

type rule struct {
	peers []peer // none: everybody
	ports []port // none: all
}

type policy struct {
	namespace, name, app string // app "": all pods of the namespace
	ingress, egress      bool   // policyTypes
	in, out              []rule
}

// state is a cluster at one moment. It doesn't change once it is in the history.
type state struct {
	env      map[string]string // of namespaces
	pods     map[int]pod       // by slot, absent while there is none
	policies map[string]policy // by file
}

func (s state) clone() state {
	return state{maps.Clone(s.env), maps.Clone(s.pods), maps.Clone(s.policies)}
}

// allows says whether a connection may be. Both ends must agree.
func (s state) allows(from, to pod, at port) bool {
	return s.side(from, to, at, false) && s.side(to, from, at, true)
}

// side is one end's say: yes if no policy isolates it in the direction, or if one of
// those that do has a rule that admits the other end.
func (s state) side(subject, other pod, at port, ingress bool) bool {
	isolated, admitted := false, false
	for _, p := range s.policies {
		if p.namespace != subject.namespace || p.app != "" && p.app != subject.app {
			continue
		}
		rules := p.out
		if ingress {
			rules = p.in
		}
		if ingress && p.ingress || !ingress && p.egress {
			isolated = true
			admitted = admitted || slices.ContainsFunc(rules, func(r rule) bool { return s.admits(p, r, other, at) })
		}
	}
	return !isolated || admitted
}

func (s state) admits(p policy, r rule, other pod, at port) bool {
	return (len(r.ports) == 0 || slices.Contains(r.ports, at)) &&
		(len(r.peers) == 0 || slices.ContainsFunc(r.peers, func(e peer) bool {
			switch {
			case e.cidr.IsValid():
				return e.cidr.Contains(other.ip) && !(e.except.IsValid() && e.except.Contains(other.ip))
			case e.env != "":
				return s.env[other.namespace] == e.env && (e.app == "" || e.app == other.app)
			}
			return other.namespace == p.namespace && e.app == other.app
		}))
}

// manifest writes a policy as people do.
func (p policy) manifest() string {
	subject := "{}"
	if p.app != "" {
		subject = "{matchLabels: {app: " + p.app + "}}"
	}
	var types, rules []string
	for _, d := range []struct {
		on          bool
		typ, key, e string
		rules       []rule
	}{{p.ingress, "Ingress", "ingress", "from", p.in}, {p.egress, "Egress", "egress", "to", p.out}} {
		if !d.on {
			continue
		}
		types = append(types, d.typ)
		var all []string
		for _, r := range d.rules {
			all = append(all, r.manifest(d.e))
		}
		rules = append(rules, fmt.Sprintf(", %s: [%s]", d.key, strings.Join(all, ", ")))
	}
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: %s, name: %s}\nspec: {podSelector: %s, policyTypes: [%s]%s}\n",
		p.namespace, p.name, subject, strings.Join(types, ", "), strings.Join(rules, ""))
}

func (r rule) manifest(end string) string {
	var parts, peers, ports []string
	for _, e := range r.peers {
		switch {
		case e.cidr.IsValid() && e.except.IsValid():
			peers = append(peers, fmt.Sprintf("{ipBlock: {cidr: %s, except: [%s]}}", e.cidr, e.except))
		case e.cidr.IsValid():
			peers = append(peers, fmt.Sprintf("{ipBlock: {cidr: %s}}", e.cidr))
		case e.env != "" && e.app != "":
			peers = append(peers, fmt.Sprintf("{namespaceSelector: {matchLabels: {env: %s}}, podSelector: {matchLabels: {app: %s}}}", e.env, e.app))
		case e.env != "":
			peers = append(peers, fmt.Sprintf("{namespaceSelector: {matchLabels: {env: %s}}}", e.env))
		default:
			peers = append(peers, fmt.Sprintf("{podSelector: {matchLabels: {app: %s}}}", e.app))
		}
	}
	for _, p := range r.ports {
		ports = append(ports, fmt.Sprintf("{protocol: %s, port: %d}", p.proto, p.number))
	}
	if peers != nil {
		parts = append(parts, end+": ["+strings.Join(peers, ", ")+"]")
	}
	if ports != nil {
		parts = append(parts, "ports: ["+strings.Join(ports, ", ")+"]")
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

var (
	namespaces = []string{"alpha", "beta", "gamma"}
	apps       = []string{"web", "db", "api"}
	envs       = []string{"prod", "test"}
	ports      = []port{{"TCP", 80}, {"TCP", 81}, {"UDP", 80}, {"UDP", 81}}
)

func pick[T any](r *rand.Rand, all []T) T { return all[r.IntN(len(all))] }

// randomPolicy isolates some pods and admits some others.
func randomPolicy(r *rand.Rand, slots int) policy {
	p := policy{namespace: pick(r, namespaces), name: fmt.Sprintf("p%d", r.IntN(1000)), app: pick(r, append([]string{""}, apps...))}
	p.ingress = r.IntN(4) > 0
	p.egress = !p.ingress || r.IntN(3) == 0
	rules := func() (all []rule) {
		for range r.IntN(4) {
			all = append(all, randomRule(r, slots))
		}
		return all
	}
	p.in, p.out = rules(), rules()
	return p
}

func randomRule(r *rand.Rand, slots int) (u rule) {
	for range r.IntN(3) {
		switch r.IntN(4) {
		case 0:
			u.peers = append(u.peers, peer{app: pick(r, apps)})
		case 1:
			u.peers = append(u.peers, peer{env: pick(r, envs)})
		case 2:
			u.peers = append(u.peers, peer{env: pick(r, envs), app: pick(r, apps)})
		case 3:
			block := peer{cidr: netip.PrefixFrom(address(r.IntN(slots)), 29).Masked()}
			if r.IntN(2) == 0 {
				block.except = netip.PrefixFrom(address(r.IntN(slots)), 32)
				if !block.cidr.Contains(block.except.Addr()) {
					block.except = netip.Prefix{}
				}
			}
			u.peers = append(u.peers, block)
		}
	}
	for range r.IntN(3) {
		u.ports = append(u.ports, pick(r, ports))
	}
	return u
}

// address gives the address of a slot, which one pod after the other has.
func address(slot int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, 0, byte(10 + slot)}) }
