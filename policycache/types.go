// Package policycache turns the cluster's state into compiled policy.
//
// Sources (a directory of manifests, later the API server) hand it objects; it
// keeps of each only what policy and the decision log need, and compiles them
// into an immutable verdict.Snapshot.
package policycache

import (
	"net/netip"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/verdict"
)

// Pod is what policy sees of a Pod.
type Pod struct {
	Namespace, Name string
	UID             string
	Labels          map[string]string
	// IPs are the pod's addresses, unmapped, primary first. Empty as long as
	// it has none.
	IPs         []netip.Addr
	Node        string
	HostNetwork bool
	// HostIPs are the addresses of the pod's node as its status names them.
	HostIPs []netip.Addr
	// Phase is as in the API: Pending, Running, Succeeded, Failed, Unknown, or
	// empty where the manifest doesn't say.
	Phase   string
	Created time.Time
	// Ports are the named ports of its containers and of its restartable init
	// containers.
	Ports []verdict.NamedPort
	// Workload is what controls the pod, as "Kind/name": a Deployment where its
	// ReplicaSet tells it by its name. Empty if nothing does.
	Workload string
}

// Key gives "namespace/name".
func (p *Pod) Key() string { return p.Namespace + "/" + p.Name }

// Namespace is what policy and the decision log see of a Namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
	// Audit is the annotation portcullis.dev/audit, as it is written.
	Audit string
	// Mode is the annotation portcullis.dev/mode, as it is written.
	Mode string
}

// Node is what policy sees of a Node.
type Node struct {
	Name  string
	Addrs []netip.Addr
	// Mode is the annotation portcullis.dev/mode, as it is written.
	Mode string
	// PodCIDRs are the ranges that the cluster gives the node for its pods, masked;
	// empty where it doesn't.
	PodCIDRs []netip.Prefix
}

// Objects is a cluster's whole state as a source sees it, keyed by name
// (nodes, namespaces) or "namespace/name" (pods, policies). Maps and what they
// point to are not changed once handed over.
type Objects struct {
	Pods       map[string]*Pod
	Namespaces map[string]*Namespace
	Nodes      map[string]*Node
	Policies   map[string]*networkingv1.NetworkPolicy

	// Given are addresses and the keys of the pods that have them by the word of
	// this node's CNI plugins, which is newer than what pods claim by their status:
	// it decides between several claims. A map that differs is another one.
	Given map[netip.Addr]string

	// Changed names what may differ from the state that the same source handed
	// over before. Nil says nothing about that, and everything is compared,
	// which costs a look at every object.
	Changed *Changed
}

// Changed names objects by their keys in Objects. It may name some that are the
// same, or that aren't there; it mustn't leave out any that differ.
type Changed struct{ Pods, Namespaces, Nodes, Policies []string }

// NewObjects gives an empty state.
func NewObjects() *Objects {
	return &Objects{
		Pods:       map[string]*Pod{},
		Namespaces: map[string]*Namespace{},
		Nodes:      map[string]*Node{},
		Policies:   map[string]*networkingv1.NetworkPolicy{},
	}
}
