package lab

import (
	"fmt"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"
)

// Table is who reached whom: one row for each source, one column for each
// destination, both in the order of Names.
type Table struct {
	Names []string
	Proto Proto
	Port  uint16
	Cells [][]Result
}

// Matrix tries a connection from each of the named members to each, itself
// included, all at the same time, over the first family that both have.
func (l *Lab) Matrix(names []string, proto Proto, port uint16, timeout time.Duration) (*Table, error) {
	var probes []Probe
	for _, from := range names {
		for _, to := range names {
			ip, err := l.common(from, to)
			if err != nil {
				return nil, err
			}
			probes = append(probes, Probe{From: from, To: ip, Proto: proto, Port: port, Timeout: timeout})
		}
	}
	results := l.TryAll(probes)
	t := &Table{Names: names, Proto: proto, Port: port}
	for i := range names {
		t.Cells = append(t.Cells, results[i*len(names):(i+1)*len(names)])
	}
	for i, r := range results {
		if r.Outcome == Failed {
			return t, fmt.Errorf("probe from %s to %s: %w", probes[i].From, probes[i].To, r.Err)
		}
	}
	return t, nil
}

// common gives the first address of to that is of a family in which from has
// one as well.
func (l *Lab) common(from, to string) (netip.Addr, error) {
	for _, ip := range l.IPs(to) {
		if first(l.IPs(from), func(a netip.Addr) bool { return a.Is4() == ip.Is4() }).IsValid() {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%s and %s have no address family in common", from, to)
}

// String draws the table: a dot where the connection was made, an X where it
// timed out, an r where it was refused.
func (t *Table) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "%s %d\t%s\n", t.Proto, t.Port, strings.Join(t.Names, "\t"))
	marks := map[Outcome]string{Connected: ".", TimedOut: "X", Refused: "r", Failed: "?"}
	for i, from := range t.Names {
		row := []string{from}
		for _, r := range t.Cells[i] {
			row = append(row, marks[r.Outcome])
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	_ = w.Flush() // writes to a strings.Builder, which can't fail
	return b.String()
}
