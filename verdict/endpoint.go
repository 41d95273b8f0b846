package verdict

import "net/netip"

// NamedPort is a port that a pod's containers give a name.
type NamedPort struct {
	Proto Protocol
	Port  uint16
	Name  string
}

// Endpoint is a pod as decisions see it. It is immutable once it is part of a
// snapshot.
type Endpoint struct {
	// Ingress and Egress are the tables that isolate the pod; nil in a
	// direction in which it isn't isolated.
	Ingress, Egress *Table
	// Judged is true when this engine decides for the pod: on an agent the
	// pods of its node, in explain all of them.
	Judged bool
	// AuditOnly has denials by the pod's tables logged and not carried out.
	AuditOnly bool
	// NamespaceIndex and LabelsIndex are the pod's rows in the snapshot's
	// selector bits: which namespace, and which set of pod labels it has.
	NamespaceIndex, LabelsIndex uint32
	// Ports are the pod's named ports, in the order of its containers.
	Ports []NamedPort

	Namespace, Name string
	// UID tells the pod from another that had its name, or has its address.
	UID   string
	Node  string
	Addrs []netip.Addr
	// Meaning is a hash over everything that decisions about this pod depend
	// on. Two endpoints of the same address and the same Meaning in successive
	// snapshots are judged alike, so that cached verdicts stay usable.
	Meaning uint64

	// What follows is for the decision log; no decision depends on it, and
	// Meaning needn't change with it.

	// Labels are the pod's; the map isn't the snapshot's to change.
	Labels map[string]string
	// Workload is what controls the pod, as "Kind/name"; empty if unknown.
	Workload string
	// Audit is what the pod's namespace asks of the log.
	Audit Audit
}

// Key gives the pod's "namespace/name".
func (e *Endpoint) Key() string { return e.Namespace + "/" + e.Name }

// Isolated tells whether some policy isolates the pod in some direction.
func (e *Endpoint) Isolated() bool { return e.Ingress != nil || e.Egress != nil }
