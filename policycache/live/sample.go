package live

import (
	"cmp"
	"slices"
	"time"
)

// Sample is an agent's figures at one moment, counted since its start. Its JSON is
// what an agent answers, and what top hands from node to node.
type Sample struct {
	Node       string    `json:"node"`
	Time       time.Time `json:"time"`
	Started    time.Time `json:"started"`
	Generation uint64    `json:"generation"`
	// Decisions are counted by verdict.
	Decisions map[string]uint64 `json:"decisions"`
	// Latency counts decisions by how long they took, the shortest first.
	Latency []Bucket `json:"latency"`
	Queues  []Queue  `json:"queues"`
	// Denied is the most often denied, at most maxDenied of them.
	Denied []Denied `json:"denied"`
}

// Bucket counts the decisions that took up to so long, and longer than the bucket
// before allows; the last has no bound, which is zero.
type Bucket struct {
	UpToNs int64  `json:"upToNs,omitempty"`
	Count  uint64 `json:"count"`
}

// Queue is what waits in one NFQUEUE, and what the kernel dropped because too much
// did.
type Queue struct {
	Number  uint16 `json:"number"`
	Waiting uint64 `json:"waiting"`
	Dropped uint64 `json:"dropped"`
}

// Denied counts the denials of one kind.
type Denied struct {
	From     string    `json:"from"`
	To       string    `json:"to"`
	Protocol string    `json:"protocol"`
	Port     uint16    `json:"port,omitempty"`
	Verdict  string    `json:"verdict"`
	Reason   string    `json:"reason"`
	Policies string    `json:"policies,omitempty"` // separated by commas
	Count    uint64    `json:"count"`
	Last     time.Time `json:"last"`
}

// key is the kind.
func (d *Denied) key() Denied {
	k := *d
	k.Count, k.Last = 0, time.Time{}
	return k
}

// NodeRow is how one node is doing.
type NodeRow struct {
	Node string `json:"node"`
	// PerSecond and DeniedPerSecond are connections judged, and those of them that
	// were denied.
	PerSecond       float64 `json:"perSecond"`
	DeniedPerSecond float64 `json:"deniedPerSecond"`
	// Median and P99 are upper bounds of the buckets that hold them; zero where
	// nothing was judged, negative where it is beyond the last bound.
	Median  time.Duration `json:"medianNs"`
	P99     time.Duration `json:"p99Ns"`
	Waiting uint64        `json:"waiting"`
	Dropped uint64        `json:"dropped"`
	Total   uint64        `json:"total"`
	Age     time.Duration `json:"-"` // of the sample
}

// DeniedRow is a kind of denials on all nodes.
type DeniedRow struct {
	Denied
	PerSecond float64 `json:"perSecond"`
}

// Top keeps the last two samples of each node. It belongs to one goroutine.
type Top struct{ nodes map[string]*pair }

type pair struct{ before, now *Sample }

// NewTop makes one that knows no node.
func NewTop() *Top { return &Top{map[string]*pair{}} }

// Add takes in a sample. An agent that was started anew counts from zero.
func (t *Top) Add(s *Sample) {
	p := t.nodes[s.Node]
	if p == nil {
		p = &pair{}
		t.nodes[s.Node] = p
	}
	p.before, p.now = p.now, s
	if p.before == nil || !p.before.Started.Equal(s.Started) || !s.Time.After(p.before.Time) {
		p.before = &Sample{Time: s.Started} // so that its figures are averages since then
	}
}

// Forget drops nodes whose last sample is older than a time.
func (t *Top) Forget(before time.Time) {
	for name, p := range t.nodes {
		if p.now.Time.Before(before) {
			delete(t.nodes, name)
		}
	}
}

// Nodes gives a row per node, by name.
func (t *Top) Nodes(now time.Time) []NodeRow {
	rows := []NodeRow{}
	for name, p := range t.nodes {
		row := NodeRow{Node: name, Age: now.Sub(p.now.Time)}
		for verdict, n := range p.now.Decisions {
			row.Total += n
			rate := p.rate(n - p.before.Decisions[verdict])
			row.PerSecond += rate
			if verdict != "allow" {
				row.DeniedPerSecond += rate
			}
		}
		for _, q := range p.now.Queues {
			row.Waiting += q.Waiting
			row.Dropped += q.Dropped
		}
		row.Median, row.P99 = p.quantile(0.5), p.quantile(0.99)
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b NodeRow) int { return cmp.Compare(a.Node, b.Node) })
	return rows
}

func (p *pair) rate(n uint64) float64 {
	seconds := p.now.Time.Sub(p.before.Time).Seconds()
	if seconds <= 0 {
		return 0
	}
	return float64(n) / seconds
}

// quantile is over the decisions between the samples.
func (p *pair) quantile(q float64) time.Duration {
	counts := make([]uint64, len(p.now.Latency))
	var total uint64
	for i, b := range p.now.Latency {
		counts[i] = b.Count
		if i < len(p.before.Latency) {
			counts[i] -= p.before.Latency[i].Count
		}
		total += counts[i]
	}
	if total == 0 {
		return 0
	}
	var below uint64
	for i, n := range counts {
		if below += n; float64(below) >= q*float64(total) {
			if upTo := p.now.Latency[i].UpToNs; upTo > 0 {
				return time.Duration(upTo)
			}
			break
		}
	}
	return -1
}

// Sorts are the orders in which Denied gives its rows.
var Sorts = []string{"count", "rate", "last", "from", "to", "policy"}

// Denied gives who is denied on all nodes, in one of the orders of Sorts.
func (t *Top) Denied(sort string) []DeniedRow {
	sums := map[Denied]*DeniedRow{}
	for _, p := range t.nodes {
		before := map[Denied]uint64{}
		for i := range p.before.Denied {
			before[p.before.Denied[i].key()] = p.before.Denied[i].Count
		}
		for i := range p.now.Denied {
			d := &p.now.Denied[i]
			key := d.key()
			row := sums[key]
			if row == nil {
				row = &DeniedRow{Denied: key}
				sums[key] = row
			}
			row.Count += d.Count
			row.PerSecond += p.rate(d.Count - min(before[key], d.Count)) // it may have been forgotten between
			if d.Last.After(row.Last) {
				row.Last = d.Last
			}
		}
	}
	rows := make([]DeniedRow, 0, len(sums))
	for _, row := range sums {
		rows = append(rows, *row)
	}
	slices.SortFunc(rows, func(a, b DeniedRow) int { return cmp.Or(byOrder(sort, &a, &b), byName(&a, &b)) })
	return rows
}

func byOrder(sort string, a, b *DeniedRow) int {
	switch sort {
	case "rate":
		return cmp.Compare(b.PerSecond, a.PerSecond)
	case "last":
		return b.Last.Compare(a.Last)
	case "from":
		return cmp.Compare(a.From, b.From)
	case "to":
		return cmp.Compare(a.To, b.To)
	case "policy":
		return cmp.Compare(a.Policies, b.Policies)
	}
	return cmp.Compare(b.Count, a.Count)
}

func byName(a, b *DeniedRow) int {
	return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(a.Protocol, b.Protocol),
		cmp.Compare(a.Port, b.Port), cmp.Compare(a.Policies, b.Policies), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Verdict, b.Verdict))
}
