package filter

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// LinkedPod is a pod whose interface is looked for.
type LinkedPod struct {
	Name  string
	Addrs []netip.Addr
	// Links are the interfaces on the node's side that the pod's CNI plugin has told
	// of, by name.
	Links []string
}

// FindPodLinks finds the interfaces by which pods' packets come in: those that the CNI
// plugin has named, without bridges, or else the veth device that the pod's own route
// leads to. A neighbour's or a bridge's table is not asked: what is there, pods
// themselves have said. Without are the names of the pods of which nothing was found,
// or of which one interface would be another's too.
func FindPodLinks(pods []LinkedPod) (found []PodLink, without []string, err error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list interfaces: %w", err)
	}
	byName, byIndex := map[string]netlink.Link{}, map[int]netlink.Link{}
	for _, l := range links {
		byName[l.Attrs().Name], byIndex[l.Attrs().Index] = l, l
	}
	routes, err := hostRoutes()
	if err != nil {
		return nil, nil, fmt.Errorf("list routes: %w", err)
	}
	owners := map[string]int{}
	for _, p := range pods {
		var names []string
		for _, name := range p.Links {
			if l := byName[name]; l != nil && l.Type() != "bridge" {
				names = append(names, name)
			}
		}
		told := len(names) > 0
		for _, a := range p.Addrs {
			if l := byIndex[routes[a]]; !told && l != nil && l.Type() == "veth" && !slices.Contains(names, l.Attrs().Name) {
				names = append(names, l.Attrs().Name)
			}
		}
		if len(names) == 0 {
			without = append(without, p.Name)
		}
		for _, name := range names {
			owners[name]++
			found = append(found, PodLink{name, p.Addrs})
		}
	}
	if shared := slices.ContainsFunc(found, func(l PodLink) bool { return owners[l.Link] > 1 }); shared {
		found, without = unshared(pods, found, owners, without)
	}
	return found, without, nil
}

// unshared takes out the interfaces that are several pods'.
func unshared(pods []LinkedPod, found []PodLink, owners map[string]int, without []string) ([]PodLink, []string) {
	own := slices.DeleteFunc(found, func(l PodLink) bool { return owners[l.Link] > 1 })
	for _, p := range pods {
		has := slices.ContainsFunc(own, func(l PodLink) bool { return slices.Equal(l.Addrs, p.Addrs) })
		if !has && !slices.Contains(without, p.Name) {
			without = append(without, p.Name)
		}
	}
	return own, without
}

// hostRoutes gives the interfaces that single addresses are routed to.
func hostRoutes() (map[netip.Addr]int, error) {
	routes, err := whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	to := map[netip.Addr]int{}
	for _, r := range routes {
		if r.Dst == nil || r.LinkIndex == 0 {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		if ones, bits := r.Dst.Mask.Size(); ok && ones == bits {
			to[a.Unmap()] = r.LinkIndex
		}
	}
	return to, nil
}
