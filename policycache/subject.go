package policycache

import (
	"encoding/binary"
	"hash/maphash"
	"slices"

	"portcullis/verdict"
)

// subject is the pods of one namespace with equal labels, which are selected by
// the same policies, and lists those, by direction and sorted by name.
type subject struct {
	namespace       *namespace
	labels          uint32
	pods            []*pod
	known           bool // that the policies are listed
	ingress, egress []*policy
}

// join puts a pod into its subject.
func (w *compilation) join(p *pod) {
	n := w.needNamespace(p.Namespace)
	n.pods++
	labels := w.podLabels.addSet(p.Labels)
	s := n.subjects[labels]
	if s == nil {
		s = &subject{namespace: n, labels: labels}
		n.subjects[labels] = s
		w.subjects = append(w.subjects, s)
	}
	s.pods = append(s.pods, p)
	p.subject = s
}

// leave takes a pod out of a subject that it was in.
func (w *compilation) leave(s *subject, p *pod) {
	at := slices.Index(s.pods, p)
	last := len(s.pods) - 1
	s.pods[at], s.pods[last] = s.pods[last], nil
	s.pods = s.pods[:last]
	if last == 0 {
		delete(s.namespace.subjects, s.labels)
	}
	w.podLabels.dropSet(s.labels)
	s.namespace.pods--
	w.leaveNamespace(s.namespace)
}

// findPolicies lists the policies that select the subject: only those of its
// own namespace can.
func (s *subject) findPolicies(m *matcher) {
	if len(s.pods) == 0 {
		return // gone already, and its labels with it
	}
	for _, p := range s.namespace.policies {
		if !m.matches(p.selector, s.labels) {
			continue
		}
		if p.ingress {
			s.ingress = append(s.ingress, p)
		}
		if p.egress {
			s.egress = append(s.egress, p)
		}
	}
	s.known = true
}

// replace takes one policy's place by another's, either of which may be nil,
// and tells whether that changes anything for the subject.
func (s *subject) replace(before, now *policy, m *matcher) (changed bool) {
	if !s.known {
		return false
	}
	if before != nil && m.matches(before.selector, s.labels) {
		s.ingress, s.egress = removePolicy(s.ingress, before), removePolicy(s.egress, before)
		changed = before.ingress || before.egress
	}
	if now != nil && m.matches(now.selector, s.labels) {
		if now.ingress {
			s.ingress = insertPolicy(s.ingress, now)
		}
		if now.egress {
			s.egress = insertPolicy(s.egress, now)
		}
		changed = changed || now.ingress || now.egress
	}
	return changed
}

// table is a compiled table and the pods that have it.
type table struct {
	*verdict.Table
	key       string
	hash      uint64 // of the key
	namespace *namespace
	policies  []*policy // set for a table that depends on bitmaps
	users     int
}

// reads tells whether the table was compiled against one of the bitmaps.
func (t *table) reads(namespaces, pods map[uint32]bool) bool {
	for _, p := range t.policies {
		for _, s := range p.peers {
			if namespaces[uint32(s.Namespace)] || pods[uint32(s.Pod)] {
				return true
			}
		}
	}
	return false
}

// ingressTable gives the table that isolates a destination, nil for none. Named
// ports are resolved by the destination's own, so pods that give the names
// different numbers have different tables.
func (w *compilation) ingressTable(p *pod, namespaceBits, podBits []verdict.Bits) *table {
	policies := p.subject.ingress
	relevant := relevantPorts(w.ports[:0], policies, p.Ports)
	w.ports = relevant
	return w.table("ingress", policies, relevant, p.subject.namespace, func(list []verdict.Policy) *verdict.Table {
		for i, p := range policies {
			list[i].Rules = resolve(p.ingressRules, relevant)
		}
		return verdict.NewTable(list, namespaceBits, podBits)
	})
}

// egressTable gives the table that isolates a source, nil for none. Its named
// ports are resolved per destination, when a flow is judged.
func (w *compilation) egressTable(p *pod, namespaceBits, podBits []verdict.Bits) *table {
	policies := p.subject.egress
	return w.table("egress", policies, nil, p.subject.namespace, func(list []verdict.Policy) *verdict.Table {
		for i, p := range policies {
			list[i].Rules = p.egressRules
		}
		return verdict.NewTable(list, namespaceBits, podBits)
	})
}

// table gives the table of some policies for one more user, one that is there
// or else a new one, which build makes of the policies' names.
func (w *compilation) table(direction string, policies []*policy, ports []verdict.NamedPort, n *namespace, build func([]verdict.Policy) *verdict.Table) *table {
	if len(policies) == 0 {
		return nil
	}
	w.key = tableKey(w.key[:0], direction, policies, ports)
	key := w.key
	t := w.tables[string(key)]
	if t == nil {
		list := make([]verdict.Policy, len(policies))
		for i, p := range policies {
			list[i].Name = p.name
		}
		t = &table{Table: build(list), key: string(key), hash: maphash.Bytes(w.seed, key), namespace: n}
		w.tables[t.key] = t
		w.matches.Share(t.Table)
		w.work.Tables++
		if t.DependsOnBits() {
			t.policies = slices.Clone(policies)
			w.wide[t] = true
		}
	}
	t.users++
	return t
}

// dropTable says that one user of the table needs it no more.
func (w *compilation) dropTable(t *table) {
	if t == nil {
		return
	}
	if t.users--; t.users == 0 {
		w.matches.Drop(t.Table)
		delete(w.wide, t)
		if w.tables[t.key] == t {
			delete(w.tables, t.key)
		}
	}
}

// tableKey appends what names a table by the policies in it, each version of which has a
// number of its own, and the named ports that they were resolved by.
func tableKey(key []byte, direction string, policies []*policy, ports []verdict.NamedPort) []byte {
	key = append(key, direction...)
	for _, p := range policies {
		key = binary.AppendUvarint(key, p.id)
	}
	key = append(key, 0) // no policy's number
	for _, p := range ports {
		key = append(key, byte(p.Proto))
		key = binary.BigEndian.AppendUint16(key, p.Port)
		key = append(binary.AppendUvarint(key, uint64(len(p.Name))), p.Name...)
	}
	return key
}

// relevantPorts appends those of a pod's named ports that the policies' ingress
// rules name.
func relevantPorts(relevant []verdict.NamedPort, policies []*policy, ports []verdict.NamedPort) []verdict.NamedPort {
	for _, port := range ports {
		named := verdict.PortName{Proto: port.Proto, Name: port.Name}
		if slices.ContainsFunc(policies, func(p *policy) bool { return slices.Contains(p.names, named) }) {
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
