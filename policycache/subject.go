package policycache

import (
	"encoding/binary"
	"slices"

	"portcullis/verdict"
)

// subjectKey tells pods apart as far as being selected goes: pods of one
// namespace with equal labels are selected by the same policies.
type subjectKey struct {
	namespace string
	labels    uint32
}

// subject lists the policies that isolate such pods, by direction.
type subject struct {
	ingress, egress []*policy
}

// subject finds the policies that select pods of a namespace with a label set:
// only policies of the pods' own namespace can.
func (w *compilation) subject(namespace string, labels uint32) subject {
	key := subjectKey{namespace, labels}
	s, ok := w.subjects[key]
	if ok {
		return s
	}
	for _, p := range w.byNS[namespace] {
		if !w.bits[p.selector].Has(labels) {
			continue
		}
		if p.ingress {
			s.ingress = append(s.ingress, p)
		}
		if p.egress {
			s.egress = append(s.egress, p)
		}
	}
	w.subjects[key] = s
	return s
}

// ingressTable gives the table that isolates a destination, and the key that
// says what is in it. Named ports are resolved by the destination's own, so
// pods that give the names different numbers have different tables.
func (w *compilation) ingressTable(s subject, ports []verdict.NamedPort) (*verdict.Table, string) {
	if len(s.ingress) == 0 {
		return nil, ""
	}
	relevant := relevantPorts(s.ingress, ports)
	key := tableKey("ingress", s.ingress, relevant)
	return w.table(key, func() []verdict.Policy {
		list := make([]verdict.Policy, len(s.ingress))
		for i, p := range s.ingress {
			list[i] = verdict.Policy{Name: p.name, Rules: resolve(p.ingressRules, relevant)}
		}
		return list
	}), key
}

// egressTable gives the table that isolates a source. Its named ports are
// resolved per destination, when a flow is judged.
func (w *compilation) egressTable(s subject) (*verdict.Table, string) {
	if len(s.egress) == 0 {
		return nil, ""
	}
	key := tableKey("egress", s.egress, nil)
	return w.table(key, func() []verdict.Policy {
		list := make([]verdict.Policy, len(s.egress))
		for i, p := range s.egress {
			list[i] = verdict.Policy{Name: p.name, Rules: p.egressRules}
		}
		return list
	}), key
}

// table gives the table of a key: one of this compile, or of the last if it
// didn't depend on which pods there are, or else a new one.
func (w *compilation) table(key string, policies func() []verdict.Policy) *verdict.Table {
	if t := w.used[key]; t != nil {
		return t
	}
	t := w.tables[key]
	if t == nil || t.DependsOnBits() {
		t = verdict.NewTable(policies(), w.nsBits, w.bits)
	}
	w.used[key] = t
	return t
}

// tableKey names a table by the policies in it, each version of which has a
// number of its own, and the named ports that they were resolved by.
func tableKey(direction string, policies []*policy, ports []verdict.NamedPort) string {
	key := []byte(direction)
	for _, p := range policies {
		key = binary.AppendUvarint(key, p.id)
	}
	key = append(key, 0) // no policy's number
	for _, p := range ports {
		key = append(key, byte(p.Proto))
		key = binary.BigEndian.AppendUint16(key, p.Port)
		key = append(binary.AppendUvarint(key, uint64(len(p.Name))), p.Name...)
	}
	return string(key)
}

// relevantPorts gives those of a pod's named ports that the policies' ingress
// rules name.
func relevantPorts(policies []*policy, ports []verdict.NamedPort) []verdict.NamedPort {
	var relevant []verdict.NamedPort
	for _, port := range ports {
		named := verdict.PortName{Proto: port.Proto, Name: port.Name}
		names := func(r verdict.Rule) bool { return slices.Contains(r.Names, named) }
		if slices.ContainsFunc(policies, func(p *policy) bool { return slices.ContainsFunc(p.ingressRules, names) }) {
			relevant = append(relevant, port)
		}
	}
	return relevant
}

// resolve replaces the names in ingress rules by the destination's numbers. A
// name that the destination doesn't have, under the rule's protocol, matches
// nothing.
func resolve(rules []verdict.Rule, ports []verdict.NamedPort) []verdict.Rule {
	resolved := slices.Clone(rules)
	for i := range resolved {
		r := &resolved[i]
		if len(r.Names) == 0 {
			continue
		}
		r.Ports = slices.Clone(r.Ports)
		for _, p := range ports {
			if slices.Contains(r.Names, verdict.PortName{Proto: p.Proto, Name: p.Name}) {
				r.Ports = append(r.Ports, verdict.PortRange{Proto: p.Proto, First: p.Port, Last: p.Port})
			}
		}
		r.Names = nil
	}
	return resolved
}
