package demo

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"portcullis/bench/lab"
	"portcullis/policycache"
	"portcullis/policycache/explain"
	"portcullis/policycache/manifest"
	"portcullis/verdict"
)

// retryTimeout is how long a connection may take that should have been made
// and wasn't within the lab's usual time: the machine may be busy, and TCP
// sends its second SYN after a second.
const retryTimeout = 3 * time.Second

// connection is one attempt: a cell of the tables over one IP family, with what
// each of three witnesses says about it.
type connection struct {
	row, column int // indexes into cast and targets
	src, dst    netip.Addr

	reached   bool             // on the wire
	predicted verdict.Decision // by explain
	logged    []decision       // by the agent: every line about it
}

// connections are all attempts of one step: everybody to every target but
// themselves, over both families.
func connections(mode lab.Mode) []connection {
	byName := map[string]*actor{}
	for i := range cast {
		byName[cast[i].name] = &cast[i]
	}
	var all []connection
	for row := range cast {
		for column, t := range targets {
			if t.to == cast[row].name {
				continue
			}
			from, to := cast[row].ips(mode), byName[t.to].ips(mode)
			for family := range from {
				all = append(all, connection{row: row, column: column, src: from[family], dst: to[family]})
			}
		}
	}
	return all
}

func (c *connection) target() target { return targets[c.column] }

// predict asks explain about each connection, by the manifests in dir. It gives
// the number of policies that the answers rest on.
func predict(dir string, all []connection) (policies int, err error) {
	objects, err := manifest.Load(dir)
	if err != nil {
		return 0, err
	}
	snapshot := policycache.NewCompiler("", slog.New(slog.DiscardHandler)).Compile(objects)
	cluster := explain.New(objects, snapshot, "")
	for i := range all {
		c := &all[i]
		answer, err := cluster.Ask(explain.Query{
			From: c.src.String(), To: c.dst.String(),
			Protocol: string(c.target().proto), Port: strconv.Itoa(int(c.target().port)),
		})
		if err != nil {
			return 0, fmt.Errorf("explain %s: %w", c, err)
		}
		c.predicted = answer.Decision
	}
	return len(objects.Policies), nil
}

// try makes the connections, all at the same time. One that should have been
// made and timed out is tried once more, with patience; one that should not
// have been made gets no second chance to behave. The error is that of a
// connection that can't even be tried.
func try(l *lab.Lab, all []connection) error {
	timeouts, err := tryThese(l, all, 0, func(*connection) bool { return true })
	if err != nil || timeouts == 0 {
		return err
	}
	_, err = tryThese(l, all, retryTimeout, func(c *connection) bool { return !c.reached && c.allowed() })
	return err
}

// tryThese makes the connections that are wanted and counts those that should
// have been made and weren't.
func tryThese(l *lab.Lab, all []connection, timeout time.Duration, want func(*connection) bool) (missing int, err error) {
	var these []*connection
	var probes []lab.Probe
	for i := range all {
		if c := &all[i]; want(c) {
			these = append(these, c)
			probes = append(probes, lab.Probe{
				From: cast[c.row].key(), To: c.dst, Proto: c.target().proto, Port: c.target().port, Timeout: timeout,
			})
		}
	}
	for i, r := range l.TryAll(probes) {
		if r.Outcome == lab.Failed {
			return 0, fmt.Errorf("try %s: %w", these[i], r.Err)
		}
		these[i].reached = r.Outcome.Reached()
		if these[i].allowed() && !these[i].reached {
			missing++
		}
	}
	return missing, nil
}

// allowed tells what explain predicts.
func (c *connection) allowed() bool { return c.predicted.Verdict == verdict.Allow }

// mustBeLogged tells whether the kernel has to ask the agent: only about pods
// that are isolated in the connection's direction, for which the decision is
// one of rules.
func (c *connection) mustBeLogged() bool {
	return c.predicted.Reason == verdict.ReasonRule || c.predicted.Reason == verdict.ReasonNoRule
}

// anyDue tells whether the decision log must have a line about some connection.
func anyDue(all []connection) bool {
	return slices.ContainsFunc(all, func(c connection) bool { return c.mustBeLogged() })
}

// String writes "client -> db:5432 tcp over IPv6".
func (c *connection) String() string {
	return fmt.Sprintf("%s -> %s over %s", cast[c.row].name, c.target(), familyName(c.dst))
}

func familyName(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// difference says in what the three witnesses don't agree; empty if they do.
func (c *connection) difference() string {
	really := map[bool]string{true: "really connects", false: "doesn't really connect"}[c.reached]
	switch {
	case c.reached != c.allowed():
		return fmt.Sprintf("%s: %s, but explain says %s", c, really, c.predicted.Verdict)
	case c.mustBeLogged() && len(c.logged) == 0:
		return fmt.Sprintf("%s: %s as explain says, but the decision log has no line about it", c, really)
	}
	for _, d := range c.logged {
		if d.Verdict != c.predicted.Verdict.String() {
			return fmt.Sprintf("%s: %s, but the decision log says %s", c, really, d.Verdict)
		}
	}
	return ""
}

func differences(all []connection) (texts []string) {
	for i := range all {
		if text := all[i].difference(); text != "" {
			texts = append(texts, text)
		}
	}
	return texts
}
