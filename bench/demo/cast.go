package demo

import (
	"net/netip"
	"strconv"
	"strings"

	"portcullis/bench/lab"
)

// actor is a pod of the shop, the stranger, or a host outside the cluster.
type actor struct {
	name      string // as the tables have it
	namespace string // empty for a host outside
	ip4, ip6  string // of a pod: what follows its network's prefix
	ports     []lab.Port
}

// cast is everybody, in the order of the tables' rows.
var cast = []actor{
	{"frontend", "shop", "10", "10", []lab.Port{{Proto: lab.TCP, Port: 80}}},
	{"api", "shop", "20", "20", []lab.Port{{Proto: lab.TCP, Port: 8080, Name: "http"}, {Proto: lab.UDP, Port: 8080}}},
	{"db", "shop", "30", "30", []lab.Port{{Proto: lab.TCP, Port: 5432}}},
	{"stranger", "other", "40", "40", []lab.Port{{Proto: lab.TCP, Port: 80}}},
	{"client", "", "198.51.100.7", "2001:db8:51::7", nil},
	{"crawler", "", "198.51.100.66", "2001:db8:51::66", nil},
}

// target is a port of an actor: a column of the tables.
type target struct {
	to    string
	proto lab.Proto
	port  uint16
	head  string // what the column says below the actor's name
}

// targets are the tables' columns. Each is served, so that what doesn't answer
// was turned away.
var targets = []target{
	{"frontend", lab.TCP, 80, ":80"},
	{"api", lab.TCP, 8080, ":8080"},
	{"api", lab.UDP, 8080, "udp"},
	{"db", lab.TCP, 5432, ":5432"},
	{"db", lab.ICMP, 0, "ping"},
	{"stranger", lab.TCP, 80, ":80"},
}

// String writes "db:5432 tcp" or "db ping".
func (t target) String() string {
	if t.proto == lab.ICMP {
		return t.to + " ping"
	}
	return t.to + ":" + strconv.Itoa(int(t.port)) + " " + strings.ToLower(string(t.proto))
}

// key is the name by which the actor goes in the lab, and a pod in manifests.
func (a *actor) key() string {
	if a.namespace == "" {
		return a.name
	}
	return a.namespace + "/" + a.name
}

// ips are the actor's addresses, IPv4 first.
func (a *actor) ips(mode lab.Mode) []netip.Addr {
	net4, net6 := "10.1.0.", "fd00:1::"
	switch {
	case a.namespace == "":
		net4, net6 = "", ""
	case mode == lab.Bridged: // within lab.BridgeNets
		net4, net6 = "10.22.0.", "fd00:22::"
	}
	return []netip.Addr{netip.MustParseAddr(net4 + a.ip4), netip.MustParseAddr(net6 + a.ip6)}
}

// build puts everybody into the lab.
func build(l *lab.Lab, mode lab.Mode) error {
	for i := range cast {
		a := &cast[i]
		if a.namespace == "" {
			if err := l.AddHost(a.name, a.ips(mode)...); err != nil {
				return err
			}
			continue
		}
		err := l.AddPod(lab.PodSpec{
			Namespace: a.namespace, Name: a.name, Labels: map[string]string{"app": a.name},
			IPs: a.ips(mode), Mode: mode, Ports: a.ports,
		})
		if err != nil {
			return err
		}
	}
	return nil
}
