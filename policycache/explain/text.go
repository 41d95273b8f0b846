package explain

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"portcullis/verdict"
)

// reasonTexts says in a sentence what a reason's word means.
var reasonTexts = map[verdict.Reason]string{
	verdict.ReasonNotIsolated: "no end is isolated in its direction, so everything is allowed",
	verdict.ReasonRule:        "each isolated end has a rule that admits the connection",
	verdict.ReasonSelf:        "a pod always reaches itself",
	verdict.ReasonOwnNode:     "a node and its own pods always reach each other",
	verdict.ReasonNeighbour:   "ICMPv6 neighbour discovery is never blocked",
	verdict.ReasonNoRule:      "an isolated end has no rule that admits the connection",
}

// WriteText writes what AskAll answered, for people: the verdict first, then
// why. A second family is written only if it is judged differently.
func (c *Cluster) WriteText(w io.Writer, answers []Answer) error {
	var b bytes.Buffer
	for i := range answers {
		a := &answers[i]
		if i > 0 {
			if sameVerdicts(&answers[0].Decision, &a.Decision) {
				continue
			}
			fmt.Fprintf(&b, "\nOver %s it is judged differently:\n\n", family(a))
		}
		c.writeBlock(&b, a)
	}
	_, err := w.Write(b.Bytes())
	return err
}

func sameVerdicts(a, b *verdict.Decision) bool {
	return a.Verdict == b.Verdict && a.Egress.Verdict == b.Egress.Verdict && a.Ingress.Verdict == b.Ingress.Verdict
}

func family(a *Answer) string {
	if a.Flow.Dst.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

func (c *Cluster) writeBlock(b *bytes.Buffer, a *Answer) {
	d := &a.Decision
	proto := strings.ToLower(a.Flow.Proto.String())
	fmt.Fprintf(b, "%s  %s %s -> %s\n", strings.ToUpper(d.Verdict.String()), proto, a.fromText(), a.toText())
	fmt.Fprintf(b, "  egress   %-5s  %s\n", d.Egress.Verdict, c.sideText(&d.Egress, a.From, a.Flow.Src, "egress"))
	fmt.Fprintf(b, "  ingress  %-5s  %s\n", d.Ingress.Verdict, c.sideText(&d.Ingress, a.To, a.Flow.Dst, "ingress"))
	fmt.Fprintf(b, "  reason   %s", d.Reason)
	if text := reasonTexts[d.Reason]; text != "" {
		fmt.Fprintf(b, ": %s", text)
	}
	b.WriteByte('\n')
	changes := c.Changes(a)
	for i := range changes {
		writeChange(b, &changes[i])
	}
}

func (a *Answer) fromText() string {
	if a.From.Pod == nil {
		return a.Flow.Src.String()
	}
	return fmt.Sprintf("%s (%s)", a.From, a.Flow.Src)
}

// toText gives the destination with the port that was judged, and beside it the
// name that was asked for.
func (a *Answer) toText() string {
	to := a.Flow.Dst.String()
	if a.To.Pod != nil {
		to = fmt.Sprintf("%s (%s)", a.To, a.Flow.Dst)
	} else if a.Flow.Dst.Is6() && a.Flow.Proto.HasPorts() {
		to = "[" + to + "]"
	}
	if a.Flow.Proto.HasPorts() {
		to += fmt.Sprintf(":%d", a.Flow.DstPort)
		if isPortName(a.Query.Port) {
			to += " (" + a.Query.Port + ")"
		}
	}
	return to
}

// sideText says why one direction, that of the end e at addr, was judged as it
// was.
func (c *Cluster) sideText(s *verdict.Side, e End, addr netip.Addr, direction string) string {
	switch {
	case e.Pod == nil:
		if node := c.snap.Node(addr); node != "" {
			return fmt.Sprintf("%s is an address of node %s: not policed", addr, node)
		}
		return fmt.Sprintf("%s is outside the cluster: not policed", addr)
	case e.Pod.HostNetwork:
		return fmt.Sprintf("%s is a hostNetwork pod: %s is its node's address and not policed", e, addr)
	case !s.Judged:
		return fmt.Sprintf("%s runs on node %s, whose agent judges its %s: unknown here", e, e.Pod.Node, direction)
	case !s.Isolated:
		return fmt.Sprintf("%s is not isolated for %s", e, direction)
	}
	policies, their := "policy", "its"
	if len(s.Policies()) > 1 {
		policies, their = "policies", "their"
	}
	text := fmt.Sprintf("%s is isolated by %s %s; ", e, policies, strings.Join(s.Policies(), ", "))
	switch {
	case s.AllowedBy().Policy != "":
		return text + fmt.Sprintf("%s rule %d of %s admits this", direction, s.AllowedBy().Rule, s.AllowedBy().Policy)
	case s.Verdict == verdict.Allow:
		return text + "this needs no rule"
	}
	text += fmt.Sprintf("none of %s %s rules admits this", their, direction)
	if s.Verdict == verdict.WouldDeny {
		text += ", but it is in audit-only mode"
	}
	return text
}

// ReasonText says in a sentence what a reason's word means, "" if the word says
// all that there is.
func ReasonText(word string) string {
	for reason, text := range reasonTexts {
		if reason.String() == word {
			return text
		}
	}
	return ""
}
