package explain

import (
	"fmt"
	"strconv"
	"strings"

	"portcullis/verdict"
)

// Query is a question as it was put: may From connect to To?
type Query struct {
	// From and To are NS/POD, POD or an IP, as Cluster.End takes them.
	From, To string
	// Protocol is TCP, UDP, SCTP or ICMP in any case; empty means TCP.
	Protocol string
	// Port is a number or the name of a port of the destination pod. ICMP has
	// no ports, and passes over it.
	Port string
}

// Answer is a question with its decision for one IP family.
type Answer struct {
	Query    Query
	From, To End
	// Flow is what was judged: the connection's first packet.
	Flow     verdict.Flow
	Decision verdict.Decision
}

// service is a protocol and a port as asked, before a destination is known.
type service struct {
	proto verdict.Protocol // ICMP stands for ICMPv6 as well
	port  uint16           // 0 if there is a name, or no port
	name  string
}

// parseProtocol knows the protocols that a question may be about.
func parseProtocol(s string) (verdict.Protocol, error) {
	switch strings.ToUpper(s) {
	case "", "TCP":
		return verdict.TCP, nil
	case "UDP":
		return verdict.UDP, nil
	case "SCTP":
		return verdict.SCTP, nil
	case "ICMP":
		return verdict.ICMP, nil
	}
	return 0, fmt.Errorf("unknown protocol %s: want TCP, UDP, SCTP or ICMP", quote(s))
}

// parseService checks the form of a protocol and a port.
func parseService(protocol, port string) (service, error) {
	proto, err := parseProtocol(protocol)
	if err != nil {
		return service{}, err
	}
	s := service{proto: proto}
	switch {
	case port == "" && proto.HasPorts():
		return service{}, fmt.Errorf("%s needs a port", proto)
	case !proto.HasPorts():
		return s, nil
	case isPortName(port):
		s.name = port
		return s, nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return service{}, fmt.Errorf("bad port %s: want 1 to 65535, or the name of a port of the destination pod", quote(port))
	}
	s.port = uint16(n)
	return s, nil
}

// isPortName tells a port's name from its number: the API wants a letter in
// each name (IANA service names, RFC 6335 section 5.1).
func isPortName(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
	})
}

// portAt gives the service's port number at the destination. A name means what
// the destination pod's containers say under the same protocol; the first of
// them counts, as it does for Services.
func (s service) portAt(to End) (uint16, error) {
	if s.name == "" {
		return s.port, nil
	}
	if to.Pod == nil {
		return 0, fmt.Errorf("port name %s can't be looked up: %s is no pod, give a number", quote(s.name), to)
	}
	var have []string
	for _, p := range to.Pod.Ports {
		if p.Name == s.name && p.Proto == s.proto {
			return p.Port, nil
		}
		have = append(have, fmt.Sprintf("%s (%d/%s)", p.Name, p.Port, p.Proto))
	}
	if len(have) == 0 {
		return 0, fmt.Errorf("pod %s has no %s port named %s: its ports have no names", to, s.proto, quote(s.name))
	}
	return 0, fmt.Errorf("pod %s has no %s port named %s: it has %s", to, s.proto, quote(s.name), strings.Join(have, ", "))
}

// flow is the first packet of a connection to the port of the service. For
// ICMP it is an echo request: type 8 (RFC 792), for IPv6 128 (RFC 4443).
func (s service) flow(p pair, port uint16) verdict.Flow {
	f := verdict.Flow{Src: p.src, Dst: p.dst, Proto: s.proto, DstPort: port}
	if s.proto == verdict.ICMP {
		f.ICMPType = 8
		if p.dst.Is6() {
			f.Proto, f.ICMPType = verdict.ICMPv6, 128
		}
	}
	return f
}

// Ask answers for the primary family: the first of the destination's addresses
// whose family the source has too. An error says what in the question can't be
// answered.
func (c *Cluster) Ask(q Query) (Answer, error) {
	all, err := c.ask(q, 1)
	if err != nil {
		return Answer{}, err
	}
	return all[0], nil
}

// AskAll answers for each family that both ends have, the primary one first.
func (c *Cluster) AskAll(q Query) ([]Answer, error) { return c.ask(q, 2) }

func (c *Cluster) ask(q Query, most int) ([]Answer, error) {
	s, err := parseService(q.Protocol, q.Port)
	if err != nil {
		return nil, err
	}
	from, err := c.End(q.From)
	if err != nil {
		return nil, fmt.Errorf("from: %w", err)
	}
	to, err := c.End(q.To)
	if err != nil {
		return nil, fmt.Errorf("to: %w", err)
	}
	port, err := s.portAt(to)
	if err != nil {
		return nil, err
	}
	families, count, err := pairs(from, to)
	if err != nil {
		return nil, err
	}
	answers := make([]Answer, 0, count)
	for _, p := range families[:min(most, count)] {
		f := s.flow(p, port)
		answers = append(answers, Answer{Query: q, From: from, To: to, Flow: f, Decision: c.snap.Decide(&f)})
	}
	return answers, nil
}
