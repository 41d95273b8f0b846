package filter

import (
	"net"
	"net/netip"
)

// localAddrs gives the addresses of all interfaces of the calling thread's network
// namespace. None is an answer too: it then errs on the closed side.
func localAddrs() map[netip.Addr]bool {
	all := map[netip.Addr]bool{}
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				all[ip.Unmap()] = true
			}
		}
	}
	return all
}
