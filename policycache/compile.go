package policycache

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net/netip"
	"slices"

	"portcullis/verdict"
)

// Problem is something wrong with an object that enforcement goes on in spite
// of: a mistake in a policy on the closed side, an address claimed twice for
// the pod with the better claim.
type Problem struct {
	Object string // such as "networkpolicy default/db"
	Err    error
}

// Compiler turns cluster state into snapshots. It keeps what it has read and
// built, and a compile does only what the difference to the state before asks
// for: a pod's change builds that pod's endpoint, a policy's those of the pods
// that it selects, with their tables. It belongs to one goroutine.
type Compiler struct {
	node string
	log  *slog.Logger
	seed maphash.Seed
	mode verdict.Mode // where neither namespace nor node says another

	generation uint64
	snapshot   *verdict.Snapshot
	work       Work

	namespaceLabels, podLabels *matcher
	rules                      ruleLists

	namespaces map[string]*namespace
	pods       map[string]*pod
	nodes      map[string]*Node
	policies   map[string]*policy // by their keys in Objects
	nextPolicy uint64
	tables     map[string]*table // those that pods have, by tableKey
	wide       map[*table]bool   // those of them that depend on bitmaps
	matches    verdict.Matches   // what tables have alike
	claims     claims
	nodeAddrs  nodeAddrs

	unknown Unknown
	ranges  *verdict.PodRanges

	invalid  map[*policy]bool    // those with mistakes
	badWords map[annotated]error // annotations that can't be understood
	problems []Problem
	logged   map[string]bool // texts of the problems
}

// Work counts what a compile built, all else being as it was.
type Work struct {
	Policies, Tables, Endpoints int
}

// NewCompiler makes a compiler whose snapshots judge the pods of one node, or
// all pods when node is empty.
func NewCompiler(node string, log *slog.Logger) *Compiler {
	return &Compiler{
		node: node, log: log, seed: maphash.MakeSeed(),
		snapshot:        verdict.NewSnapshot(verdict.Input{}, nil),
		namespaceLabels: newMatcher(),
		podLabels:       newMatcher(),
		rules:           ruleLists{},
		namespaces:      map[string]*namespace{},
		pods:            map[string]*pod{},
		nodes:           map[string]*Node{},
		policies:        map[string]*policy{},
		tables:          map[string]*table{},
		wide:            map[*table]bool{},
		claims:          claims{only: map[netip.Addr]*pod{}, rivals: map[netip.Addr][]*pod{}},
		nodeAddrs:       nodeAddrs{},
		invalid:         map[*policy]bool{},
		badWords:        map[annotated]error{},
	}
}

// Problems lists what is wrong with the objects of the last compile, in the
// order of their names.
func (c *Compiler) Problems() []Problem { return c.problems }

// Invalid is how many policies of the last compile have mistakes.
func (c *Compiler) Invalid() int { return len(c.invalid) }

// Work tells what the last compile built.
func (c *Compiler) Work() Work { return c.work }

// compilation is the work of one compile: what has to be looked at anew, in the
// order in which it is.
type compilation struct {
	*Compiler
	key             []byte              // of tableKey, written over and over
	ports           []verdict.NamedPort // of relevantPorts, likewise
	subjects        []*subject          // new ones, whose policies aren't known yet
	stalePods       []*pod              // whose endpoints have to be made anew
	staleAddrs      []netip.Addr        // that may have another pod, some twice
	staleNodeAddrs  map[netip.Addr]bool // that may have other nodes
	problemsChanged bool
}

// Compile makes the snapshot of a state. It is the caller's to swap in. The
// states that a compiler is given come from one source, none left out: see
// Objects.Changed.
func (c *Compiler) Compile(o *Objects) *verdict.Snapshot {
	w := &compilation{Compiler: c, staleNodeAddrs: map[netip.Addr]bool{}}
	c.work = Work{}
	changed := o.Changed
	if c.generation == 0 || changed == nil {
		changed = c.difference(o)
	}
	for _, name := range changed.Nodes {
		w.changeNode(name, o.Nodes[name])
	}
	for _, name := range changed.Namespaces {
		w.changeNamespace(name, o.Namespaces[name])
	}
	for _, key := range changed.Pods {
		w.changePod(key, o.Pods[key])
	}
	for _, key := range changed.Policies {
		w.changePolicy(key, o.Policies[key])
	}
	w.noteGiven(o.Given)
	w.noteRanges()
	for _, s := range w.subjects {
		s.findPolicies(c.podLabels)
	}
	change := verdict.Change{Versions: w.versions(changed.Policies), Ranges: c.ranges, AuditOnly: c.nodeMode(c.node) == verdict.ModeAuditOnly}
	change.NamespaceBits, change.PodBits = w.shareBits()
	w.buildEndpoints(change.NamespaceBits, change.PodBits)
	change.Owners, change.Nodes = w.changedAddrs()
	c.generation++
	change.Generation = c.generation
	c.snapshot = c.snapshot.Next(change)
	if w.problemsChanged {
		c.report()
	}
	return c.snapshot
}

// versions gives the policies' resourceVersions that have changed. Nothing is
// compiled anew for another one.
func (w *compilation) versions(keys []string) map[string]string {
	versions := map[string]string{}
	for _, key := range keys {
		version := ""
		if p := w.policies[key]; p != nil {
			version = p.source.ResourceVersion
		}
		if version != w.snapshot.PolicyVersion(key) {
			versions[key] = version
		}
	}
	return versions
}

// shareBits gives the bitmaps for the new snapshot. Tables that were compiled
// against some that have changed are dropped, and their pods will have others.
func (w *compilation) shareBits() (namespaceBits, podBits []verdict.Bits) {
	namespaceBits, namespacesChanged := w.namespaceLabels.bits.share()
	podBits, podsChanged := w.podLabels.bits.share()
	for t := range w.wide {
		if !t.reads(namespacesChanged, podsChanged) {
			continue
		}
		delete(w.tables, t.key)
		delete(w.wide, t)
		for _, s := range t.namespace.subjects {
			for _, p := range s.pods {
				if p.ingress == t || p.egress == t {
					w.stale(p)
				}
			}
		}
	}
	return namespaceBits, podBits
}

// buildEndpoints makes what decisions need of the pods that have changed, or
// whose policies have.
func (w *compilation) buildEndpoints(namespaceBits, podBits []verdict.Bits) {
	w.staleAddrs = slices.Grow(w.staleAddrs, 2*len(w.stalePods))
	for _, p := range w.stalePods {
		p.stale = false
		ingress, egress := p.ingress, p.egress
		p.ingress, p.egress, p.endpoint = nil, nil, nil
		if p.subject != nil {
			if w.judges(p) {
				p.ingress = w.ingressTable(p, namespaceBits, podBits)
				p.egress = w.egressTable(p, namespaceBits, podBits)
			}
			p.endpoint = w.endpoint(p)
			w.work.Endpoints++
		}
		w.dropTable(ingress)
		w.dropTable(egress)
		w.staleAddrs = append(w.staleAddrs, p.claimed()...)
	}
}

// endpoint makes what decisions need of a pod, whose tables are there already.
func (w *compilation) endpoint(p *pod) *verdict.Endpoint {
	e := &verdict.Endpoint{
		Namespace:      p.Namespace,
		Name:           p.Name,
		Node:           p.Node,
		Addrs:          p.IPs,
		Judged:         w.judges(p),
		AuditOnly:      w.auditOnly(p),
		NamespaceIndex: p.subject.namespace.labels,
		LabelsIndex:    p.subject.labels,
		Ports:          p.Ports,
		UID:            p.UID,
		Labels:         p.Labels,
		Workload:       p.Workload,
		Audit:          p.subject.namespace.audit,
	}
	var h maphash.Hash
	h.SetSeed(w.seed)
	for _, t := range [2]*table{p.ingress, p.egress} {
		if t != nil {
			writeNumber(&h, t.hash)
		} else {
			writeNumber(&h, 0)
		}
	}
	if p.ingress != nil {
		e.Ingress = p.ingress.Table
	}
	if p.egress != nil {
		e.Egress = p.egress.Table
	}
	writeAll(&h, p.UID, p.Namespace, p.Name, p.Node)
	writeNumber(&h, w.namespaceLabels.sets.all[e.NamespaceIndex].value.hash)
	writeNumber(&h, w.podLabels.sets.all[e.LabelsIndex].value.hash)
	for _, a := range p.IPs {
		b := a.As16()
		h.Write(b[:])
	}
	for _, port := range p.Ports {
		writeNumber(&h, uint64(port.Proto)<<16|uint64(port.Port))
		writeAll(&h, port.Name)
	}
	if e.AuditOnly {
		writeNumber(&h, 1) // one more than others have
	}
	e.Meaning = h.Sum64()
	return e
}

// writeAll hashes texts so that where one ends and the next begins matters.
func writeAll(h *maphash.Hash, texts ...string) {
	for _, t := range texts {
		writeNumber(h, uint64(len(t)))
		h.WriteString(t)
	}
}

func writeNumber(h *maphash.Hash, n uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	h.Write(b[:])
}

// changedAddrs gives the addresses that have another endpoint, or other nodes,
// than in the snapshot before.
func (w *compilation) changedAddrs() (map[netip.Addr]*verdict.Endpoint, map[netip.Addr][]string) {
	owners, nodes := make(map[netip.Addr]*verdict.Endpoint, len(w.staleAddrs)), map[netip.Addr][]string{}
	for _, a := range w.staleAddrs {
		var e *verdict.Endpoint
		if p := w.claims.owner(a); p != nil {
			e = p.endpoint
		}
		if e != w.snapshot.Endpoint(a) {
			owners[a] = e
		}
		// Whose claims count may be another, even if the owner isn't.
		w.problemsChanged = w.problemsChanged || len(w.claims.rivals[a]) > 0
	}
	for a := range w.staleNodeAddrs {
		nodes[a] = w.nodeAddrs.names(a)
	}
	return owners, nodes
}

// report gathers the problems, and logs those that weren't there before.
func (c *Compiler) report() {
	problems := c.claims.problems()
	for p := range c.invalid {
		problems = append(problems, Problem{Object: "networkpolicy " + p.name, Err: p.err})
	}
	for a, err := range c.badWords {
		problems = append(problems, Problem{Object: a.kind + " " + a.name, Err: err})
	}
	slices.SortFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Err.Error(), b.Err.Error()))
	})
	now := map[string]bool{}
	for _, p := range problems {
		text := fmt.Sprintf("%s: %v", p.Object, p.Err)
		now[text] = true
		if !c.logged[text] {
			c.log.Warn("something is wrong with an object, enforcement goes on", "object", p.Object, "err", p.Err)
		}
	}
	c.problems, c.logged = problems, now
}
