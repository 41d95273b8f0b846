package filter

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// kernelBridgePods makes two pods on a bridge of the namespace that the test is in,
// with the ports va and vb.
func kernelBridgePods(t *testing.T) (a, b kernelPod) {
	t.Helper()
	node, err := netns.Get()
	kernelOK(t, err)
	defer node.Close()
	kernelRun(t, `ip link add cni0 type bridge
		echo 0 > /proc/sys/net/ipv6/conf/cni0/accept_dad
		ip addr add 10.0.0.254/24 dev cni0
		ip addr add fd00::254/64 dev cni0 nodad
		ip link set cni0 up`)
	pods := []*kernelPod{&a, &b}
	for i, p := range pods {
		*p = kernelPod{ns: kernelNewNetns(t), v4: fmt.Sprint("10.0.0.", i+1), v6: fmt.Sprint("fd00::", i+1)}
		kernelRun(t, strings.NewReplacer("V4", p.v4, "V6", p.v6).Replace(`ip link add eth0 type veth peer name port
			echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
			ip addr add V4/24 dev eth0
			ip addr add V6/64 dev eth0 nodad
			ip link set eth0 up
			ip -6 route add default via fd00::254
			ip route add default via 10.0.0.254`))
	}
	kernelOK(t, netns.Set(node))
	for i, p := range pods {
		name := string(rune('a' + i))
		kernelIn(t, p.ns, func() { kernelMoveLink(t, "port", node) })
		kernelRun(t, "ip link set port name v"+name+"; ip link set v"+name+" master cni0 up")
	}
	return a, b
}

// kernelArrives sends datagrams from a pod with a source address until one arrives, or
// none has for a while: longer if one should.
func kernelArrives(t *testing.T, from kernelPod, src string, to *net.UDPConn, dst string, should bool) bool {
	t.Helper()
	var c *net.UDPConn
	kernelIn(t, from.ns, func() {
		var err error
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(src), 0)), net.UDPAddrFromAddrPort(kernelTarget(dst, to)))
		kernelOK(t, err)
	})
	defer c.Close()
	buf := make([]byte, 64)
	word := src + fmt.Sprint(time.Now().UnixNano())
	tries := 15
	if should {
		tries = 150 // new links lose what is sent at first
	}
	for range tries {
		c.Write([]byte(word))
		kernelOK(t, to.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
		if n, err := to.Read(buf); err == nil && string(buf[:n]) == word {
			return true
		}
	}
	return false
}

// TestAntiSpoof: a pod sends with its own addresses and with no others, to pods and to
// the node, routed and bridged, in both families. Who isn't watched sends as before.
func TestAntiSpoof(t *testing.T) {
	for _, mode := range []string{"routed", "bridged"} {
		t.Run(mode, func(t *testing.T) {
			ns := kernelNetns(t)
			var a, b kernelPod
			link := "va"
			if mode == "routed" {
				a, b, link = kernelAddPod(t, "va", "10.0.0.1", "fd00::1"), kernelAddPod(t, "vb", "10.0.0.2", "fd00::2"), "va"
			} else {
				a, b = kernelBridgePods(t)
			}
			for n, p := range map[string]kernelPod{"77": a, "78": b} {
				kernelIn(t, p.ns, func() {
					kernelRun(t, strings.ReplaceAll("ip addr add 10.0.0.N/32 dev eth0; ip addr add fd00::N/128 dev eth0 nodad", "N", n))
				})
			}
			node := kernelPod{ns: ns, v4: "10.0.0.254", v6: "fd00::254"}
			if mode == "routed" {
				node.v4, node.v6 = "169.254.1.1", "fd00:1::1"
			}
			toB, toNode, toA := kernelSocket(t, b, "udp"), kernelSocket(t, node, "udp"), kernelSocket(t, a, "udp")
			expect := func(when string, own, forged bool) {
				t.Helper()
				for _, c := range []struct {
					from kernelPod
					src  string
					to   *net.UDPConn
					dst  string
					want bool
				}{
					{a, a.v4, toB, b.v4, own}, {a, a.v6, toB, b.v6, own}, {a, a.v4, toNode, node.v4, own}, {a, a.v6, toNode, node.v6, own},
					{a, "10.0.0.77", toB, b.v4, forged}, {a, "fd00::77", toB, b.v6, forged},
					{a, "10.0.0.77", toNode, node.v4, forged}, {a, "fd00::77", toNode, node.v6, forged},
					{b, "10.0.0.78", toA, a.v4, true}, {b, "fd00::78", toA, a.v6, true}, {b, b.v4, toA, a.v4, true},
				} {
					if got := kernelArrives(t, c.from, c.src, c.to, c.dst, c.want); got != c.want {
						t.Errorf("%s: from %s to %s: arrived %v", when, c.src, c.dst, got)
					}
				}
			}
			s := NewAntiSpoof(kernelQuiet())
			expect("without", true, true)
			kernelOK(t, s.Set([]PodLink{{link, kernelAddrs(a.v4 + " " + a.v6)}}))
			expect("watched", true, false)
			n := s.Dropped()
			if n < 4 || s.Links() != 1 {
				t.Errorf("%d dropped of %d links", n, s.Links())
			}
			// The neighbours are looked for anew, as by a pod that starts.
			for _, p := range []kernelPod{a, b, node} {
				kernelIn(t, p.ns, func() { kernelRun(t, "ip -4 neigh flush all; ip -6 neigh flush all") })
			}
			expect("with no neighbours known", true, false)
			kernelRun(t, "nft flush ruleset")
			if said, err := s.Repair(); err != nil || len(said) != 2 {
				t.Errorf("repaired %q, %v", said, err)
			}
			if said, err := s.Repair(); err != nil || len(said) != 0 {
				t.Errorf("repaired again %q, %v", said, err)
			}
			expect("repaired", true, false)
			before := s.Dropped()
			kernelOK(t, s.Set([]PodLink{{link, kernelAddrs("10.0.0.77 fd00::77")}}))
			expect("other addresses", false, true)
			if after := s.Dropped(); after <= before {
				t.Errorf("%d dropped before, %d after", before, after)
			}
			kernelOK(t, s.Set(nil))
			expect("not watched any more", true, true)
			kernelOK(t, RemoveAntiSpoof())
			kernelOK(t, RemoveAntiSpoof())
			if left := kernelRun(t, "nft list tables"); strings.Contains(left, spoofTable) {
				t.Errorf("left: %s", left)
			}
		})
	}
}

// TestAntiSpoofManyLinks: the rules are as many for hundreds of pods as for one.
func TestAntiSpoofManyLinks(t *testing.T) {
	kernelNetns(t)
	s := NewAntiSpoof(kernelQuiet())
	kernelOK(t, s.Set(nil))
	rules := func() int {
		return strings.Count(kernelRun(t, "nft -a list table inet "+spoofTable+"; nft -a list table bridge "+spoofTable), "# handle")
	}
	none := rules()
	var links []PodLink
	addrs := kernelMany(1200)
	for i := 0; i < len(addrs); i += 2 {
		links = append(links, PodLink{fmt.Sprint("veth", i), addrs[i : i+2]})
	}
	kernelOK(t, s.Set(append(links, PodLink{"a-name-that-no-interface-can-have", nil}, PodLink{})))
	if got := rules(); got != none || s.Links() != 1200 {
		t.Errorf("%d handles with %d links, %d with none", got, s.Links(), none)
	}
	kernelOK(t, s.Set(links[:600]))
	if n := strings.Count(kernelRun(t, "nft list set bridge "+spoofTable+" pairs6"), " . fd01::"); n != 600 {
		t.Errorf("%d pairs, want 600", n)
	}
}

// TestFindPodLinks: by the pod's own route, or by the CNI plugin's word.
func TestFindPodLinks(t *testing.T) {
	kernelNetns(t)
	kernelRun(t, `ip link add cni0 type bridge
		ip link set cni0 up
		for v in v1 v2 v3; do ip link add $v type veth peer name p$v; ip link set $v up; done
		ip link set v3 master cni0
		ip route add 10.0.0.1/32 dev v1
		ip -6 route add fd00::2/128 dev v2
		ip route add 10.0.0.4/32 dev lo
		ip route add 10.0.0.5/32 dev v2
		ip route add 10.0.0.0/24 dev cni0`)
	for _, c := range []struct{ name, pods, want, without string }{
		{"routed", "a 10.0.0.1 -; b fd00::2 -", "v1[10.0.0.1] v2[fd00::2]", ""},
		{"bridged", "a 10.0.0.3 cni0,v3", "v3[10.0.0.3]", ""},
		{"bridged, and nobody says so", "a 10.0.0.3 -", "", "a"},
		{"a device that isn't there", "a 10.0.0.3 gone; b 10.0.0.1 gone", "v1[10.0.0.1]", "a"},
		{"a device of another kind", "a 10.0.0.4 -", "", "a"},
		{"one for two", "a 10.0.0.5 -; b fd00::2 -; c 10.0.0.1 -", "v1[10.0.0.1]", "a b"},
	} {
		var pods []LinkedPod
		for _, text := range strings.Split(c.pods, "; ") {
			f := strings.Fields(text)
			p := LinkedPod{Name: f[0], Addrs: kernelAddrs(f[1])}
			if f[2] != "-" {
				p.Links = strings.Split(f[2], ",")
			}
			pods = append(pods, p)
		}
		found, without, err := FindPodLinks(pods)
		kernelOK(t, err)
		var got []string
		for _, l := range found {
			got = append(got, fmt.Sprint(l.Link, l.Addrs))
		}
		if g := strings.Join(got, " "); g != c.want || strings.Join(without, " ") != c.without {
			t.Errorf("%s: %q, without %q; want %q, without %q", c.name, g, without, c.want, c.without)
		}
	}
}

// kernelMoveLink moves a link of the namespace that the test is in to another.
func kernelMoveLink(t *testing.T, name string, to netns.NsHandle) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	kernelOK(t, err)
	kernelOK(t, netlink.LinkSetNsFd(l, int(to)))
}
