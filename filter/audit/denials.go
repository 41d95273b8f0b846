package audit

import (
	"cmp"
	"slices"
	"strings"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"portcullis/verdict"
)

// maxDenials is how many kinds of denials are counted apart. Beyond it those that
// were seen the longest ago are forgotten.
const maxDenials = 4096

// Denied counts the denials of one kind: who wanted to reach whom, by what, and
// the policies that have no rule for it.
type Denied struct {
	// Src and Dst are "namespace/name" of pods, else addresses; empty where the
	// packet's couldn't be read.
	Src, Dst string
	Protocol string
	Port     uint16 // zero where there is none
	Verdict  string
	Reason   string
	// Policies are those of the directions that denied, egress first, separated by
	// commas.
	Policies string
	Count    uint64
	// First and Last are when the first and the last one's packet came, in
	// nanoseconds since 1970.
	First, Last int64
}

// denialKey is what tells kinds of denials apart; pods are found by their names,
// whatever becomes of their addresses.
type denialKey struct {
	src, dst string
	proto    verdict.Protocol
	port     uint16
	verdict  string
	reason   verdict.Reason
	policies string
}

// denials counts denials by kind. It belongs to its tap.
type denials struct {
	seen *simplelru.LRU[denialKey, *Denied]
}

func newDenials() *denials {
	seen, err := simplelru.NewLRU[denialKey, *Denied](maxDenials, nil)
	if err != nil {
		panic(err) // of a size below one alone
	}
	return &denials{seen}
}

// add counts a decision, unless it is an allow.
func (d *denials) add(rec *Record) {
	if rec.Decision.Verdict == verdict.Allow {
		return
	}
	f, decision := &rec.Flow, &rec.Decision
	key := denialKey{proto: f.Proto, verdict: rec.word(), reason: decision.Reason, policies: deniers(decision)}
	key.src, key.dst = endName(decision.Src, f.Src.IsValid(), f.Src.String), endName(decision.Dst, f.Dst.IsValid(), f.Dst.String)
	if f.Defect == verdict.ReasonNone && f.Proto.HasPorts() {
		key.port = f.DstPort
	}
	one, ok := d.seen.Get(key)
	if !ok {
		one = &Denied{Src: key.src, Dst: key.dst, Protocol: f.Proto.String(), Port: key.port,
			Verdict: key.verdict, Reason: decision.Reason.String(), Policies: key.policies, First: rec.Time}
		d.seen.Add(key, one)
	}
	one.Count++
	one.Last = max(one.Last, rec.Time)
}

func endName(pod *verdict.Endpoint, known bool, addr func() string) string {
	switch {
	case pod != nil:
		return pod.Key()
	case known:
		return addr()
	}
	return ""
}

// deniers names the policies of the directions that turned the flow away.
func deniers(d *verdict.Decision) string {
	var names []string
	for _, s := range [2]*verdict.Side{&d.Egress, &d.Ingress} {
		if s.Judged && s.Verdict != verdict.Allow {
			names = append(names, s.Policies()...)
		}
	}
	return strings.Join(names, ",")
}

// list gives the counts, the highest first.
func (d *denials) list() []Denied {
	all := make([]Denied, 0, d.seen.Len())
	for _, one := range d.seen.Values() {
		all = append(all, *one)
	}
	slices.SortFunc(all, func(a, b Denied) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(b.Last, a.Last), cmp.Compare(a.Src+a.Dst, b.Src+b.Dst))
	})
	return all
}
