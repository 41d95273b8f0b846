package demo

import (
	"fmt"
	"io"
	"strings"

	"portcullis/bench/lab"
)

// mostGroups is how many entries of the decision log a step shows.
const mostGroups = 5

// printer writes for people. It keeps the first error of its writer: whoever
// prints a lot looks once.
type printer struct {
	w     io.Writer
	color bool
	err   error
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

// The colours of ECMA-48 that the demo uses.
const (
	bold    = "1"
	dim     = "2"
	red     = "31"
	green   = "32"
	inverse = "1;37;41"
)

// paint colours a text, on a terminal.
func (p *printer) paint(code, text string) string {
	if !p.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (p *printer) indented(text, by string) {
	for line := range strings.Lines(text) {
		p.printf("%s%s\n", by, strings.TrimRight(line, "\n"))
	}
}

// picture shows who is there: hosts on the left, pods on the right.
func (p *printer) picture(mode lab.Mode) {
	wire := "each on a veth pair"
	if mode == lab.Bridged {
		wire = "ports of one bridge"
	}
	var hosts, pods []string
	for i := range cast {
		a := &cast[i]
		if a.namespace == "" {
			hosts = append(hosts, fmt.Sprintf("%-8s %-14s --", a.name, a.ips(mode)[0]))
		} else {
			pods = append(pods, fmt.Sprintf("-- %-14s  %-10s  %s", a.key(), a.ips(mode)[0], describePorts(a.ports)))
		}
	}
	p.printf("%s\n\n", p.paint(bold, "A shop, a stranger and the world outside, each in a network namespace of its own"))
	p.printf("  %-26s  %-14s     %s\n", "outside the cluster", "", "pods, "+wire)
	boxes := []string{lab.NodeName, "iptables", "NFQUEUE", "portcullis"}
	for i, pod := range pods {
		host := ""
		if i < len(hosts) {
			host = hosts[i]
		}
		p.printf("  %-26s | %-10s | %s\n", host, boxes[i%len(boxes)], pod)
	}
	p.printf("\n  Everybody has an IPv6 address as well; each cell below is two connections, one over each.\n")
	p.printf("  %s connects   %s turned away   - itself   v4, v6 connects over that one only   ! they differ\n\n",
		p.paint(green, "ok"), p.paint(red, "X"))
}

func describePorts(ports []lab.Port) string {
	var all []string
	for _, port := range ports {
		text := fmt.Sprintf("%s %d", strings.ToLower(string(port.Proto)), port.Port)
		if port.Name != "" {
			text += fmt.Sprintf(" %q", port.Name)
		}
		all = append(all, text)
	}
	return strings.Join(all, ", ")
}

// step announces a change and shows it.
func (p *printer) step(number int, s step) error {
	p.printf("%s\n", p.paint(bold, fmt.Sprintf("%d. %s", number, s.title)))
	p.printf("   %s\n\n", s.why)
	change, err := s.change()
	if err != nil {
		return err
	}
	for _, line := range change {
		p.printf("   %s\n", p.paint(dim, line))
	}
	if len(change) > 0 {
		p.printf("\n")
	}
	return p.err
}

// decisions shows what the decision log says that is new, or all of it.
func (p *printer) decisions(groups []*group, all bool) {
	if len(groups) == 0 {
		p.printf("The decision log tells nothing: the kernel asks the agent about isolated pods only.\n\n")
		return
	}
	p.printf("What the decision log tells:\n")
	left := 0
	for i, g := range groups {
		if !all && (i >= mostGroups || g.rank == 2) {
			left += len(g.rows)
			continue
		}
		p.group(g)
	}
	if left > 0 {
		p.printf("   (and %d more: -v shows all)\n", left)
	}
	p.printf("\n")
}

func (p *printer) group(g *group) {
	code := green
	if g.verdict == "deny" {
		code = red
	}
	var from []string
	for _, row := range g.rows {
		from = append(from, cast[row].name)
	}
	family := ""
	if !g.v6 {
		family = ", over IPv4 only"
	} else if !g.v4 {
		family = ", over IPv6 only"
	}
	p.printf("   %s  %s -> %s%s\n", p.paint(code, fmt.Sprintf("%-5s", strings.ToUpper(g.verdict))),
		strings.Join(from, ", "), targets[g.column], family)
	p.indented(g.why, "          ")
}

// problems shows what the agent complains of.
func (p *printer) problems(texts []string) {
	if len(texts) == 0 {
		return
	}
	p.printf("What the agent complains of:\n")
	for _, text := range texts {
		who, what, _ := strings.Cut(text, ": ")
		p.printf("   %s\n", who)
		p.indented(what, "          ")
	}
	p.printf("\n")
}
