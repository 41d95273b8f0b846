package explain

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"portcullis/verdict"
)

// Matrix is the truth table of all pods against all pods for one protocol and
// port. Its cells are judged while it is written, row by row, so that its size
// in memory grows with the pods and not with their square.
type Matrix struct {
	cluster *Cluster
	service service
	pods    []matrixPod
	leftOut []error
}

// matrixPod is a pod with what a cell needs of it as a destination.
type matrixPod struct {
	key  string
	end  End
	port uint16
	// noPort is why it has no such port; nil if it has.
	noPort error
}

// cell is one entry of the table: a decision, or why there is none.
type cell struct {
	decision verdict.Decision
	err      error
}

// Matrix prepares the table of the pods of a namespace, or of all pods if the
// namespace is empty, in the order of their names. Protocol and port are as in
// Query; a port's name means what each destination says. The error is one of
// the protocol, the port or the namespace.
func (c *Cluster) Matrix(protocol, port, namespace string) (*Matrix, error) {
	s, err := parseService(protocol, port)
	if err != nil {
		return nil, err
	}
	m := &Matrix{cluster: c, service: s}
	_, known := c.objects.Namespaces[namespace]
	for _, key := range slices.Sorted(maps.Keys(c.objects.Pods)) {
		p := c.objects.Pods[key]
		if namespace != "" && p.Namespace != namespace {
			continue
		}
		known = true
		end, err := c.endOfPod(p)
		if err != nil {
			m.leftOut = append(m.leftOut, err)
			continue
		}
		mp := matrixPod{key: key, end: end}
		mp.port, mp.noPort = s.portAt(end)
		m.pods = append(m.pods, mp)
	}
	if namespace != "" && !known {
		return nil, fmt.Errorf("there is no namespace %s", quote(namespace))
	}
	return m, nil
}

// LeftOut says of each pod that isn't in the table why: it has finished, or has
// no address of its own.
func (m *Matrix) LeftOut() []error { return m.leftOut }

func (m *Matrix) cell(from, to *matrixPod) cell {
	if to.noPort != nil {
		return cell{err: to.noPort}
	}
	families, _, err := pairs(from.end, to.end)
	if err != nil {
		return cell{err: err}
	}
	f := m.service.flow(families[0], to.port)
	d := m.cluster.snap.Decide(&f)
	if d.Src != nil && d.Dst != nil && !d.Egress.Judged && !d.Ingress.Judged && m.cluster.ofNode {
		return cell{err: errors.New("neither pod is this node's to judge")}
	}
	return cell{decision: d}
}

// WriteText writes the table for people: a row for each source and a numbered
// column for each destination.
func (m *Matrix) WriteText(w io.Writer) error {
	b := bufio.NewWriter(w)
	if len(m.pods) == 0 {
		fmt.Fprintf(b, "%s: no pods to connect\n", m.service)
		return b.Flush()
	}
	fmt.Fprintf(b, "%s: rows connect to columns\n", m.service)
	fmt.Fprint(b, ".  allowed    X  denied    -  itself    ?  no such port, or no IP family in common")
	if m.cluster.ofNode {
		fmt.Fprint(b, ", or neither is this node's to judge")
	}
	fmt.Fprintln(b)
	if m.auditOnly() {
		fmt.Fprintln(b, "~  would be denied, but an end in audit-only mode lets it pass")
	}
	fmt.Fprintln(b)
	digits := len(strconv.Itoa(len(m.pods)))
	names := 0
	for i := range m.pods {
		names = max(names, len(m.pods[i].title()))
	}
	fmt.Fprintf(b, "%*s  %-*s ", digits, "", names, "")
	for i := range m.pods {
		fmt.Fprintf(b, " %*d", digits, i+1)
	}
	fmt.Fprintln(b)
	for i := range m.pods {
		from := &m.pods[i]
		fmt.Fprintf(b, "%*d  %-*s ", digits, i+1, names, from.title())
		for j := range m.pods {
			fmt.Fprintf(b, " %*s", digits, m.mark(from, &m.pods[j]))
		}
		// A buffered writer keeps its first error, so one look a row is enough.
		if _, err := fmt.Fprintln(b); err != nil {
			return err
		}
	}
	return b.Flush()
}

// auditOnly tells whether the table may have cells that would be denied.
func (m *Matrix) auditOnly() bool {
	return slices.ContainsFunc(m.pods, func(p matrixPod) bool {
		e := m.cluster.snap.Endpoint(p.end.Addrs[0])
		return e != nil && e.AuditOnly
	})
}

// title names a pod in the table's first column.
func (p *matrixPod) title() string {
	if p.end.Pod.HostNetwork {
		return p.key + " (hostNetwork)"
	}
	return p.key
}

// mark is a cell's one letter, as in the legend.
func (m *Matrix) mark(from, to *matrixPod) string {
	if from == to {
		return "-"
	}
	c := m.cell(from, to)
	switch {
	case c.err != nil:
		return "?"
	case c.decision.Verdict == verdict.Allow:
		return "."
	case c.decision.Verdict == verdict.WouldDeny:
		return "~"
	}
	return "X"
}

// String gives the service as "TCP 80", "TCP http" or "ICMP echo".
func (s service) String() string {
	switch {
	case !s.proto.HasPorts():
		return s.proto.String() + " echo"
	case s.name != "":
		return s.proto.String() + " " + s.name
	}
	return s.proto.String() + " " + strconv.Itoa(int(s.port))
}

// matrixRow is one cell in JSON: a verdict with its reason, or an error.
type matrixRow struct {
	From    string `json:"from"`
	To      string `json:"to"`
	Verdict string `json:"verdict,omitempty"`
	Reason  string `json:"reason,omitempty"`
	Error   string `json:"error,omitempty"`
}

// WriteJSON writes the table as one object: protocol, port (absent for ICMP),
// pods, and rows, in which each pair of pods is one line {from, to, verdict,
// reason}, or {from, to, error} where the destination has no such port or the
// two have no IP family in common.
func (m *Matrix) WriteJSON(w io.Writer) error {
	b := bufio.NewWriter(w)
	keys := make([]string, len(m.pods))
	for i := range m.pods {
		keys[i] = m.pods[i].key
	}
	fmt.Fprintf(b, "{\n\"protocol\": %s,\n", marshal(m.service.proto.String()))
	if m.service.name != "" {
		fmt.Fprintf(b, "\"port\": %s,\n", marshal(m.service.name))
	} else if m.service.port != 0 {
		fmt.Fprintf(b, "\"port\": %d,\n", m.service.port)
	}
	fmt.Fprintf(b, "\"pods\": %s,\n\"rows\": [", marshal(keys))
	separator := "\n"
	for i := range m.pods {
		for j := range m.pods {
			row := marshal(m.row(&m.pods[i], &m.pods[j]))
			if _, err := fmt.Fprintf(b, "%s%s", separator, row); err != nil {
				return err
			}
			separator = ",\n"
		}
	}
	fmt.Fprint(b, "\n]\n}\n")
	return b.Flush()
}

func (m *Matrix) row(from, to *matrixPod) matrixRow {
	r := matrixRow{From: from.key, To: to.key}
	c := m.cell(from, to)
	if c.err != nil {
		r.Error = c.err.Error()
		return r
	}
	r.Verdict, r.Reason = c.decision.Verdict.String(), c.decision.Reason.String()
	return r
}

// marshal is json.Marshal for values that always marshal.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings and structs of strings can't fail
	}
	return b
}
