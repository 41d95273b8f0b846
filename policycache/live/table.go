package live

import (
	"bytes"
	"fmt"
	"text/tabwriter"
	"time"
)

// Page is top's tables as text. Most is how many rows of denials it has at most,
// all if it isn't above zero; zone is that of its times.
func (t *Top) Page(sort string, most int, now time.Time, zone *time.Location) string {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tCONN/S\tDENIED/S\tMEDIAN\tP99\tWAITING\tDROPPED\tJUDGED")
	for _, r := range t.Nodes(now) {
		stale := ""
		if r.Age > 10*time.Second {
			stale = fmt.Sprintf("  (%s ago)", r.Age.Round(time.Second))
		}
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%s\t%s\t%d\t%d\t%d%s\n", r.Node, r.PerSecond, r.DeniedPerSecond,
			bound(r.Median), bound(r.P99), r.Waiting, r.Dropped, r.Total, stale)
	}
	w.Flush() // into memory, which never refuses
	b.WriteByte('\n')
	rows := t.Denied(sort)
	if len(rows) == 0 {
		b.WriteString("nothing was denied\n")
		return b.String()
	}
	fmt.Fprintln(w, "COUNT\tRATE/S\tLAST\tFROM\tTO\tPORT\tBY")
	for i := range rows {
		if most > 0 && i == most {
			break
		}
		r := &rows[i]
		fmt.Fprintf(w, "%d\t%.1f\t%s\t%s\t%s\t%s\t%s\n", r.Count, r.PerSecond, r.Last.In(zone).Format("15:04:05"), orNobody(r.From), orNobody(r.To), r.port(), r.by())
	}
	w.Flush()
	if more := len(rows) - most; most > 0 && more > 0 {
		fmt.Fprintf(&b, "and %d more\n", more)
	}
	return b.String()
}

// bound writes a quantile, which is only known by the bucket that it is in.
func bound(d time.Duration) string {
	switch {
	case d == 0:
		return "-"
	case d < 0:
		return "beyond"
	}
	return "<" + d.String()
}

func orNobody(name string) string {
	if name == "" {
		return "?"
	}
	return name
}

func (d *Denied) port() string {
	if d.Port == 0 {
		return d.Protocol
	}
	return fmt.Sprintf("%d/%s", d.Port, d.Protocol)
}

// by names the policies, and the verdict and the reason where they aren't the usual
// ones.
func (d *Denied) by() string {
	text := d.Policies
	if d.Reason != "no-rule" {
		text += " (" + d.Reason + ")"
	}
	if d.Verdict != "deny" {
		text += " " + d.Verdict
	}
	return text
}
