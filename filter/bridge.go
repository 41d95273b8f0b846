package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// ErrBridge says that packets between pods on a bridge can't be enforced.
var ErrBridge = errors.New("policy can't be enforced on bridged pods")

// SysctlDir is where the kernel's sysctls are, unless a container's view of them
// can't be written and the node's is mounted elsewhere. Whatever the mount, those
// of net/ are those of the opening thread's network namespace.
const SysctlDir = "/proc/sys"

// CheckBridges sees to it that packets between pods on one Linux bridge pass
// iptables at all. Given where the sysctls are (see SysctlDir) and the addresses
// of the node's own pods, it looks for a
// bridge of this network namespace that carries one of them: the route to it
// leaves by the bridge, or a prefix of the bridge's addresses holds it. If
// there is one and bridge-nf-call-iptables (for IPv6 addresses
// bridge-nf-call-ip6tables) is off, it is switched on; the module br_netfilter
// is loaded for that if need be. So is bridge-nf-filter-vlan-tagged, or a frame
// with a priority tag, which its receiver takes for one without, would pass no
// rule at all. If that fails, the error wraps ErrBridge and says what to do.
// Nothing is changed where no bridge carries pods.
//
// Frames with two priority tags pass no rule even so: br_netfilter looks behind
// one tag only. Who lets pods send what frames they like (CAP_NET_RAW) drops
// those with ebtables.
func CheckBridges(sysctls string, pods []netip.Addr) error {
	bridges, err := listBridges()
	if err != nil {
		return fmt.Errorf("look for bridges: %w", err)
	}
	if len(bridges) == 0 {
		return nil
	}
	done := map[string]bool{}
	for _, pod := range pods {
		pod = pod.Unmap()
		knob := "bridge-nf-call-iptables"
		if pod.Is6() {
			knob = "bridge-nf-call-ip6tables"
		}
		if done[knob] {
			continue
		}
		b := carrier(bridges, pod)
		if b == nil {
			continue
		}
		done[knob] = true
		for _, k := range []string{knob, "bridge-nf-filter-vlan-tagged"} {
			if err := switchOn(filepath.Join(sysctls, "net/bridge", k), k, b.name); err != nil {
				return err
			}
		}
	}
	return nil
}

// bridge is a Linux bridge device and the prefixes of its addresses.
type bridge struct {
	index    int
	name     string
	prefixes []netip.Prefix
}

func listBridges() ([]bridge, error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return nil, err
	}
	var bridges []bridge
	for _, l := range links {
		if l.Type() != "bridge" {
			continue
		}
		b := bridge{index: l.Attrs().Index, name: l.Attrs().Name}
		addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			ip, _ := netip.AddrFromSlice(a.IP)
			ones, _ := a.Mask.Size()
			b.prefixes = append(b.prefixes, netip.PrefixFrom(ip.Unmap(), ones))
		}
		bridges = append(bridges, b)
	}
	return bridges, nil
}

// carrier gives the bridge that carries a pod, or nil.
func carrier(bridges []bridge, pod netip.Addr) *bridge {
	routes, err := netlink.RouteGet(pod.AsSlice())
	if err != nil {
		routes = nil // no route to it; a prefix may still hold it
	}
	for i := range bridges {
		b := &bridges[i]
		for _, r := range routes {
			if r.LinkIndex == b.index {
				return b
			}
		}
		for _, p := range b.prefixes {
			if p.Contains(pod) {
				return b
			}
		}
	}
	return nil
}

// switchOn turns one of br_netfilter's switches, whose file is path, on for a
// bridge that carries pods, unless it is on.
func switchOn(path, knob, bridge string) error {
	state, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		out, loadErr := exec.Command("modprobe", "br_netfilter").CombinedOutput()
		state, err = os.ReadFile(path)
		if err != nil {
			why := flat(string(out))
			if why == "" && loadErr != nil {
				why = loadErr.Error()
			}
			return fmt.Errorf("%w: bridge %s carries pods, but the kernel module br_netfilter isn't loaded: run modprobe br_netfilter on the node (tried: %s)", ErrBridge, bridge, why)
		}
	}
	if err == nil && strings.TrimSpace(string(state)) != "0" {
		return nil
	}
	if err == nil {
		err = os.WriteFile(path, []byte("1"), 0o644)
	}
	if err != nil {
		return fmt.Errorf("%w: bridge %s carries pods, but net.bridge.%s is off: run sysctl -w net.bridge.%s=1 on the node (tried: %w)", ErrBridge, bridge, knob, knob, err)
	}
	return nil
}

// whole repeats a dump that a concurrent change has interrupted.
func whole[T any](dump func() ([]T, error)) (list []T, err error) {
	for range 5 {
		list, err = dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return list, err
}
