package live

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"portcullis/policycache/explain"
)

// colours are ANSI's, by verdict; a verdict that isn't here is bold.
var colours = map[string]string{"allow": "\x1b[32m", "deny": "\x1b[1;31m", "would-deny": "\x1b[33m", "revoked": "\x1b[35m"}

const (
	bold  = "\x1b[1m"
	plain = "\x1b[0m"
	faint = "\x1b[2m"
)

// Text writes a record as a line for people, without its end, in the words of
// explain: when, the verdict, who wanted to reach whom, why, and which node says
// so. Times are those of the zone.
func (r *Record) Text(colour bool, zone *time.Location) string {
	paint := func(c, text string) string {
		if !colour {
			return text
		}
		return c + text + plain
	}
	at := r.Time.In(zone).Format("Jan _2 15:04:05.000")
	if r.Missing() {
		return fmt.Sprintf("%s  %s  %d lost, %d suppressed  [%s]", at, paint(bold, "MISSING"), r.Lost, r.Suppressed, r.Node)
	}
	c, ok := colours[r.Verdict]
	if !ok {
		c = bold
	}
	verdict := paint(c, fmt.Sprintf("%-5s", strings.ToUpper(r.Verdict)))
	return fmt.Sprintf("%s  %s  %s %s -> %s  %s  %s", at, verdict, strings.ToLower(r.Protocol),
		r.Src.text(false), r.Dst.text(true), r.why(), paint(faint, "["+r.Node+"]"))
}

// text names an end: the pod, else the node, else the address. A source's port says
// nothing.
func (e *End) text(port bool) string {
	name := e.IP
	switch {
	case e.Pod != "":
		name = fmt.Sprintf("%s/%s (%s)", e.Namespace, e.Pod, e.IP)
	case e.Node != "":
		name = fmt.Sprintf("node %s (%s)", e.Node, e.IP)
	case e.IP == "":
		return "?"
	}
	if !port || e.Port == nil {
		return name
	}
	if a, err := netip.ParseAddr(e.IP); err == nil && a.Is6() && name == e.IP {
		name = "[" + name + "]"
	}
	return fmt.Sprintf("%s:%d", name, *e.Port)
}

// why says what decided: the directions that turned the connection away, or else
// the rules that admit it, or else the reason.
func (r *Record) why() string {
	var denied, admitted []string
	for _, d := range []struct {
		name string
		side *Side
		end  *End
	}{{"egress", r.Egress, &r.Src}, {"ingress", r.Ingress, &r.Dst}} {
		switch {
		case d.side == nil:
		case d.side.Verdict != "allow":
			denied = append(denied, fmt.Sprintf("%s is isolated for %s by %s", d.end.short(), d.name, policies(d.side.Policies)))
		case d.side.AllowedBy != nil:
			admitted = append(admitted, fmt.Sprintf("%s rule %d of %s", d.name, d.side.AllowedBy.Rule, d.side.AllowedBy.Policy))
		}
	}
	switch {
	case len(denied) > 0 && r.Reason == "no-rule":
		return strings.Join(denied, " and ") + "; no rule admits this"
	case len(denied) > 0:
		return r.Reason + ": " + strings.Join(denied, " and ")
	case len(admitted) > 0 && r.Reason == "rule":
		return strings.Join(admitted, " and ") + " admits this"
	}
	if text := explain.ReasonText(r.Reason); text != "" {
		return r.Reason + ": " + text
	}
	return r.Reason
}

func (e *End) short() string {
	if e.Pod == "" {
		return e.text(false)
	}
	return e.Namespace + "/" + e.Pod
}

func policies(names []string) string {
	if len(names) == 1 {
		return "policy " + names[0]
	}
	return "policies " + strings.Join(names, ", ")
}
