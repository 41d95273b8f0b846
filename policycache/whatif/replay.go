package whatif

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"portcullis/verdict"
)

// Replay judges a log's connections anew and keeps what comes out otherwise.
type Replay struct {
	state     *State
	changes   map[string]*change
	report    Report
	notPlaced map[string]uint64
}

// Report is what a log's connections would be in another state. Its numbers are
// connections: records, each times its count.
type Report struct {
	Connections uint64 `json:"connections"`
	Unchanged   uint64 `json:"unchanged"`
	Denied      uint64 `json:"wouldBeDenied"`
	Allowed     uint64 `json:"wouldBeAllowed"`
	// AuditOnly are those, of the unchanged, that policy denies and that passed in
	// audit-only mode.
	AuditOnly uint64 `json:"passedInAuditOnly"`
	// StandIns are those, of the numbers above, whose pod has gone and that
	// were judged by another pod of its workload.
	StandIns  uint64      `json:"judgedByStandIns"`
	NotPlaced []NotPlaced `json:"notPlaced"`
	Changes   []Change    `json:"changes"`
}

// NotPlaced counts the connections that can't be judged in the other state.
type NotPlaced struct {
	Why         string `json:"why"`
	Connections uint64 `json:"connections"`
}

// Change is the connections of one pair to one port that were judged alike in
// the log, and will be judged alike and otherwise.
type Change struct {
	// From and To are workloads or pods as "namespace/name", or addresses.
	From     string `json:"from"`
	To       string `json:"to"`
	Protocol string `json:"protocol"`
	// Port is absent for protocols without ports.
	Port        *uint16 `json:"port,omitempty"`
	Connections uint64  `json:"connections"`
	// First and Last are when the log saw them, RFC 3339 in whole seconds.
	First    string    `json:"first,omitempty"`
	Last     string    `json:"last,omitempty"`
	Logged   Judgement `json:"logged"`
	Proposed Judgement `json:"proposed"`
}

type change struct {
	Change
	seen span
}

// NewReplay makes a replay into a proposed state.
func NewReplay(proposed *State) *Replay {
	return &Replay{state: proposed, changes: map[string]*change{}, notPlaced: map[string]uint64{}}
}

// Add judges a record's connection in the proposed state, in the directions in
// which it was judged when it was logged. An exemption from policy holds in any
// state; a connection that was refused before policy was asked can't be judged.
func (p *Replay) Add(r *Record) {
	p.report.Connections += r.Count
	if r.exempt() {
		p.report.Unchanged += r.Count
		return
	}
	if r.unasked() {
		p.notPlaced["policy wasn't asked ("+r.Reason+")"] += r.Count
		return
	}
	f, standIn, err := p.state.place(r)
	if err != nil {
		p.notPlaced[err.Error()] += r.Count
		return
	}
	if standIn {
		p.report.StandIns += r.Count
	}
	d := p.state.snap.Decide(&f)
	proposed := judgement(&d, r.Directions)
	switch now := verdicts[proposed.Verdict]; {
	case now == r.allowed():
		p.report.Unchanged += r.Count
		if r.Verdict == verdict.WouldDeny.String() {
			p.report.AuditOnly += r.Count
		}
		return
	case now:
		p.report.Allowed += r.Count
	default:
		p.report.Denied += r.Count
	}
	p.note(r, &f, &d, proposed)
}

func (p *Replay) note(r *Record, f *verdict.Flow, d *verdict.Decision, proposed Judgement) {
	c := Change{
		From:     p.state.described(f.Src, d.Src),
		To:       p.state.described(f.Dst, d.Dst),
		Protocol: f.Proto.String(),
		Logged:   r.Judgement,
		Proposed: proposed,
	}
	if f.Proto.HasPorts() && f.Defect == verdict.ReasonNone {
		c.Port = &f.DstPort
	}
	key := fmt.Sprint(c.From, " ", c.service(), " ", c.To, "\n", c.Logged.String(), "\n", c.Proposed.String())
	group := p.changes[key]
	if group == nil {
		group = &change{Change: c}
		p.changes[key] = group
	}
	group.Connections += r.Count
	group.seen.add(r.Time)
}

// Report gives what has been found so far: the changes sorted, those to deny
// first, and then by pair and port.
func (p *Replay) Report() *Report {
	report := p.report
	report.NotPlaced, report.Changes = []NotPlaced{}, []Change{}
	for why, n := range p.notPlaced {
		report.NotPlaced = append(report.NotPlaced, NotPlaced{why, n})
	}
	slices.SortFunc(report.NotPlaced, func(a, b NotPlaced) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), cmp.Compare(a.Why, b.Why))
	})
	for _, key := range slices.Sorted(maps.Keys(p.changes)) {
		c := p.changes[key]
		c.First, c.Last = c.seen.ends()
		report.Changes = append(report.Changes, c.Change)
	}
	slices.SortStableFunc(report.Changes, func(a, b Change) int {
		return cmp.Or(-cmp.Compare(a.Proposed.Verdict, b.Proposed.Verdict),
			compareNames(a.From, b.From), compareNames(a.To, b.To), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.port(), b.port()))
	})
	return &report
}

// compareNames sorts addresses by number, and before names.
func compareNames(a, b string) int {
	x, errA := netip.ParseAddr(strings.Fields(a)[0])
	y, errB := netip.ParseAddr(strings.Fields(b)[0])
	switch {
	case errA == nil && errB == nil:
		return x.Compare(y)
	case errA == nil:
		return -1
	case errB == nil:
		return 1
	}
	return cmp.Compare(a, b)
}

func (c *Change) port() uint16 {
	if c.Port == nil {
		return 0
	}
	return *c.Port
}

func (c *Change) service() string {
	if c.Port == nil {
		return c.Protocol
	}
	return fmt.Sprintf("%s %d", c.Protocol, *c.Port)
}

// Judged is how many connections could be judged.
func (r *Report) Judged() uint64 { return r.Unchanged + r.Denied + r.Allowed }

// WriteJSON writes the report as one indented object.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// mostReasons is how many reasons for not being placed the text names.
const mostReasons = 10

// WriteText writes the report for people: each change with who decides, then
// the sums.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	for i := range r.Changes {
		c := &r.Changes[i]
		seen := ""
		if c.First != "" {
			seen = ", " + c.First
			if c.Last != c.First {
				seen += " to " + c.Last
			}
		}
		fmt.Fprintf(&b, "%-5s  %s -> %s %s  (%s%s)\n", strings.ToUpper(c.Proposed.Verdict), c.From, c.To, c.service(), connections(c.Connections), seen)
		fmt.Fprintf(&b, "  logged    %s\n  proposed  %s\n\n", c.Logged.String(), c.Proposed.String())
	}
	fmt.Fprintf(&b, "%s: %d would be denied, %d would be allowed, %d unchanged, %d can't be judged\n",
		connections(r.Connections), r.Denied, r.Allowed, r.Unchanged, r.Connections-r.Judged())
	if r.AuditOnly > 0 {
		fmt.Fprintf(&b, "  denied still, and passed in audit-only mode alone: %d\n", r.AuditOnly)
	}
	if r.StandIns > 0 {
		fmt.Fprintf(&b, "  judged by another pod of the workload, theirs being gone: %d\n", r.StandIns)
	}
	for i, n := range r.NotPlaced {
		if i == mostReasons {
			fmt.Fprintf(&b, "  can't be judged for other reasons: %d\n", len(r.NotPlaced)-i)
			break
		}
		fmt.Fprintf(&b, "  can't be judged: %d, %s\n", n.Connections, n.Why)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func connections(n uint64) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

// String gives the verdict and who decided it: the rules that admit, or the
// policies that isolate where no rule does.
func (j *Judgement) String() string {
	var words []string
	for _, d := range []struct {
		name string
		side *Side
	}{{egress, j.Egress}, {ingress, j.Ingress}} {
		switch {
		case d.side == nil:
		case d.side.AllowedBy != nil && verdicts[j.Verdict]:
			words = append(words, fmt.Sprintf("%s rule %d of %s", d.name, d.side.AllowedBy.Rule, d.side.AllowedBy.Policy))
		case !verdicts[d.side.Verdict] && len(d.side.Policies) > 0:
			words = append(words, fmt.Sprintf("%s isolated by %s", d.name, strings.Join(d.side.Policies, ", ")))
		}
	}
	text := fmt.Sprintf("%s (%s)", j.Verdict, j.Reason)
	if len(words) > 0 {
		text += ": " + strings.Join(words, "; ")
	}
	return text
}
