package filter

import (
	"strings"
	"testing"
)

// kernelKnobs gives br_netfilter's switches in this namespace: for IPv4, IPv6
// and tagged frames.
func kernelKnobs(t *testing.T) string {
	t.Helper()
	return strings.Join(strings.Fields(kernelRun(t, "cd /proc/sys/net/bridge; cat bridge-nf-call-iptables bridge-nf-call-ip6tables bridge-nf-filter-vlan-tagged")), "")
}

func TestCheckBridges(t *testing.T) {
	const bridge = "ip link add cni0 type bridge; ip link set cni0 up\n"
	const veth = "ip link add eth9 type veth peer name eth8; ip link set eth8 up; ip link set eth9 up; ip addr add 10.0.0.1/24 dev eth9\n"
	for _, c := range []struct{ name, script, pods, before, after string }{
		{"no bridge", veth, "10.0.0.2", "000", "000"},
		{"bridge without pods", bridge + veth, "10.0.0.2", "000", "000"},
		{"no pods", bridge + "ip addr add 10.0.0.1/24 dev cni0", "", "000", "000"},
		{"prefix holds pods", bridge + "ip addr add 10.0.0.1/24 dev cni0", "10.0.0.2 10.0.0.3", "000", "101"},
		{"prefix holds IPv6 pods", bridge + "ip addr add fd00::1/64 dev cni0 nodad", "fd00::2", "000", "011"},
		{"dual stack", bridge + "ip addr add 10.0.0.1/24 dev cni0; ip addr add fd00::1/64 dev cni0 nodad", "10.0.0.2 fd00::2", "000", "111"},
		{"4-in-6 pod", bridge + "ip addr add 10.0.0.1/24 dev cni0", "::ffff:10.0.0.2", "000", "101"},
		{"route to the pod", bridge + "ip route add 10.0.0.2/32 dev cni0", "10.9.0.1 10.0.0.2", "000", "101"},
		{"route to another", bridge + "ip route add 10.0.0.2/32 dev cni0", "10.0.0.9", "000", "000"},
		{"bridge that is down", "ip link add cni0 type bridge; ip addr add 10.0.0.1/24 dev cni0", "10.0.0.2", "000", "101"},
		{"on already", bridge + "ip addr add 10.0.0.1/24 dev cni0", "10.0.0.2", "100", "101"},
	} {
		t.Run(c.name, func(t *testing.T) {
			kernelNetns(t)
			kernelRun(t, "cd /proc/sys/net/bridge; echo "+c.before[:1]+" > bridge-nf-call-iptables; echo "+c.before[1:2]+" > bridge-nf-call-ip6tables; echo "+c.before[2:]+" > bridge-nf-filter-vlan-tagged")
			kernelRun(t, c.script)
			for range 2 {
				kernelOK(t, CheckBridges(SysctlDir, kernelAddrs(c.pods)))
				if got := kernelKnobs(t); got != c.after {
					t.Errorf("switches are %s, want %s", got, c.after)
				}
			}
		})
	}
}

// TestCheckBridgesCannot: one line says why and what to do.
func TestCheckBridgesCannot(t *testing.T) {
	const bridge = "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables; ip link add cni0 type bridge; ip addr add 10.0.0.1/24 dev cni0\n"
	for _, c := range []struct{ name, script, want string }{
		{"read-only", "mount -o bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys", "run sysctl -w net.bridge.bridge-nf-call-iptables=1"},
		{"no module", "mount -t tmpfs none /proc/sys/net/bridge", "run modprobe br_netfilter"},
	} {
		t.Run(c.name, func(t *testing.T) {
			kernelThrowaway(t, func() {
				if _, err := kernelTry(bridge + c.script); err != nil {
					t.Error(err)
					return
				}
				if err := CheckBridges(SysctlDir, kernelAddrs("10.9.9.9")); err != nil {
					t.Errorf("for a pod that isn't on the bridge: %v", err)
				}
				err := CheckBridges(SysctlDir, kernelAddrs("10.0.0.2"))
				kernelOneLine(t, err, ErrBridge, c.want)
				if err != nil && !strings.Contains(err.Error(), "cni0") {
					t.Errorf("the bridge isn't named: %v", err)
				}
			})
		})
	}
}

// TestCheckBridgesElsewhere: in a container /proc/sys can't be written, but the
// node's can, where it is mounted for that.
func TestCheckBridgesElsewhere(t *testing.T) {
	kernelThrowaway(t, func() {
		if _, err := kernelTry(`cd /proc/sys/net/bridge; echo 0 > bridge-nf-call-iptables; echo 0 > bridge-nf-call-ip6tables; echo 0 > bridge-nf-filter-vlan-tagged; cd /
			ip link add cni0 type bridge; ip addr add 10.0.0.1/24 dev cni0
			mkdir -p /run/node/net; mount -o bind /proc/sys/net /run/node/net
			mount -o bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys`); err != nil {
			t.Error(err)
			return
		}
		if err := CheckBridges(SysctlDir, kernelAddrs("10.0.0.2")); err == nil {
			t.Error("the container's own sysctls could be written: nothing is shown")
		}
		if err := CheckBridges("/run/node", kernelAddrs("10.0.0.2")); err != nil {
			t.Error(err)
		}
		if got := kernelKnobs(t); got != "101" {
			t.Errorf("switches are %s, want 101", got)
		}
	})
}
