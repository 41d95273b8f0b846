package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"portcullis/bench/lab"
)

// logPatience is how long the decision log may take to tell of connections
// that are over. The agent writes within milliseconds.
const logPatience = 2 * time.Second

// decision is what the demo reads of a decision log's line.
type decision struct {
	Verdict, Reason, Protocol string
	Src, Dst                  struct {
		IP   netip.Addr
		Port uint16
	}
	Egress, Ingress *side
	LatencyNs       int64
}

type side struct {
	Verdict   string
	Isolated  bool
	Policies  []string
	AllowedBy *struct {
		Policy string
		Rule   int
	}
}

// logReader reads a decision log as it grows.
type logReader struct {
	path   string
	offset int64
}

// more gives the whole lines that were written since the last call.
func (r *logReader) more() ([]decision, error) {
	f, err := os.Open(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the decision log: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.NewSectionReader(f, r.offset, 1<<40))
	if err != nil {
		return nil, fmt.Errorf("read the decision log: %w", err)
	}
	text = text[:bytes.LastIndexByte(text, '\n')+1]
	r.offset += int64(len(text))
	var all []decision
	for line := range bytes.Lines(text) {
		var d decision
		if err := json.Unmarshal(line, &d); err != nil {
			return nil, fmt.Errorf("read the decision log: %w in %q", err, bytes.TrimSpace(line))
		}
		// Of connections that a change has cut: UDP's of before, which conntrack
		// takes for open for a while. They are no answer to an attempt.
		if d.Verdict != "revoked" {
			all = append(all, d)
		}
	}
	return all, nil
}

// flow is what a line of the log and a connection have in common.
type flow struct {
	src, dst netip.Addr
	protocol string
	port     uint16
}

func (d *decision) flow() flow { return flow{d.Src.IP, d.Dst.IP, d.Protocol, d.Dst.Port} }

func (c *connection) flow() flow {
	protocol := string(c.target().proto)
	if c.target().proto == lab.ICMP && c.dst.Is6() {
		protocol = "ICMPv6"
	}
	return flow{c.src, c.dst, protocol, c.target().port}
}

// collect gives each connection its lines of the log, and waits until those
// that the agent had to decide have one. What is missing after that is for
// difference to tell.
func (r *logReader) collect(ctx context.Context, all []connection) error {
	byFlow := map[flow]*connection{}
	for i := range all {
		byFlow[all[i].flow()] = &all[i]
	}
	for end := time.Now().Add(logPatience); ; {
		lines, err := r.more()
		if err != nil {
			return err
		}
		for _, d := range lines {
			if c := byFlow[d.flow()]; c != nil {
				c.logged = append(c.logged, d)
			}
		}
		missing := slices.ContainsFunc(all, func(c connection) bool { return c.mustBeLogged() && len(c.logged) == 0 })
		if !missing || time.Now().After(end) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
	}
}

// why says in a line for each direction that matters how a decision came about.
func (d *decision) why() string {
	var lines []string
	for _, s := range []struct {
		direction string
		*side
	}{{"egress", d.Egress}, {"ingress", d.Ingress}} {
		switch {
		case s.side == nil || !s.Isolated || d.Verdict == "deny" && s.Verdict == "allow":
		case s.AllowedBy != nil:
			lines = append(lines, fmt.Sprintf("%s: rule %d of %s admits it", s.direction, s.AllowedBy.Rule, s.AllowedBy.Policy))
		case s.Verdict == "deny":
			lines = append(lines, fmt.Sprintf("%s: isolated by %s; no rule admits it", s.direction, strings.Join(s.Policies, ", ")))
		}
	}
	if len(lines) == 0 {
		return d.Reason
	}
	return strings.Join(lines, "\n")
}

// group is decisions that differ in nothing but the source and the IP family:
// one entry of what the demo shows of the log.
type group struct {
	verdict string
	column  int
	why     string
	rows    []int
	v4, v6  bool
	rank    int // 0: the verdict is another than before, 1: the reason is, 2: all as before
}

// history remembers the last decision about each flow, as its verdict and why.
type history map[flow][2]string

// groups puts a step's decisions together, what is new before what isn't, and
// takes them into the history. A flow that the log never told of was allowed:
// the kernel asks about isolated pods only.
func (h history) groups(all []connection) []*group {
	var out []*group
	for i := range all {
		c := &all[i]
		if len(c.logged) == 0 {
			continue
		}
		d := &c.logged[len(c.logged)-1]
		now := [2]string{d.Verdict, d.why()}
		before, known := h[c.flow()]
		if !known {
			before[0] = "allow"
		}
		rank := 2
		if now[0] != before[0] {
			rank = 0
		} else if now[1] != before[1] {
			rank = 1
		}
		h[c.flow()] = now
		out = join(out, c, now, rank)
	}
	slices.SortStableFunc(out, func(a, b *group) int {
		if a.rank != b.rank {
			return a.rank - b.rank
		}
		return a.column - b.column
	})
	return out
}

// join puts a connection into the group where it belongs.
func join(groups []*group, c *connection, now [2]string, rank int) []*group {
	i := slices.IndexFunc(groups, func(g *group) bool {
		return g.verdict == now[0] && g.column == c.column && g.why == now[1] && g.rank == rank
	})
	if i < 0 {
		i, groups = len(groups), append(groups, &group{verdict: now[0], column: c.column, why: now[1], rank: rank})
	}
	g := groups[i]
	if !slices.Contains(g.rows, c.row) {
		g.rows = append(g.rows, c.row)
	}
	g.v4, g.v6 = g.v4 || c.dst.Is4(), g.v6 || c.dst.Is6()
	return groups
}
