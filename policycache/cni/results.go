// Package cni reads which addresses the CNI plugins have given to the pods of this
// node, from the cache that the runtime's libcni keeps for their removal. There an
// address is known before the pod's first container starts; in the API it appears
// when kubelet next tells the pod's status, which may be after that.
package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"
)

// maxSize bounds how much of a file is read; libcni's are of a few KiB.
const maxSize = 1 << 20

// podInterface is the name that kubelet's runtimes give a pod's one interface of the
// cluster network. Others, such as loopback, are cached beside it.
const podInterface = "eth0"

// result is what one file tells: a pod's addresses. It is of one sandbox of the pod;
// a pod whose sandbox is replaced has two for a while.
type result struct {
	namespace, name, uid string
	addrs                []netip.Addr
	links                []string // the interfaces on the node's side, by name
	written              time.Time
}

// key gives "namespace/name".
func (r *result) key() string { return r.namespace + "/" + r.name }

// parse reads a file of libcni's cache (cniCacheV1 of containernetworking/cni, and its
// results since version 0.3.0 of the CNI specification). It gives nil for what isn't
// the addition of a pod to the cluster network.
func parse(b []byte) (*result, error) {
	var file struct {
		Kind    string      `json:"kind"`
		IfName  string      `json:"ifName"`
		CNIArgs [][2]string `json:"cniArgs"`
		Result  struct {
			IPs []struct {
				Address   string `json:"address"`
				Interface *int   `json:"interface"`
			} `json:"ips"`
			Interfaces []struct {
				Name    string `json:"name"`
				Sandbox string `json:"sandbox"`
			} `json:"interfaces"`
		} `json:"result"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, err
	}
	if file.Kind != "cniCacheV1" || file.IfName != podInterface {
		return nil, nil
	}
	r := new(result)
	for _, arg := range file.CNIArgs {
		switch arg[0] {
		case "K8S_POD_NAMESPACE":
			r.namespace = arg[1]
		case "K8S_POD_NAME":
			r.name = arg[1]
		case "K8S_POD_UID":
			r.uid = arg[1]
		}
	}
	if r.namespace == "" || r.name == "" {
		return nil, nil
	}
	for _, i := range file.Result.Interfaces {
		if i.Sandbox == "" && i.Name != "" {
			r.links = append(r.links, i.Name)
		}
	}
	for _, ip := range file.Result.IPs {
		// An address is on the interface that it names by its index; one of the
		// node's side, which has no sandbox, is not the pod's.
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(file.Result.Interfaces) && file.Result.Interfaces[*i].Sandbox == "" {
			continue
		}
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			return nil, fmt.Errorf("address of %s: %w", r.key(), err)
		}
		if addr := prefix.Addr().Unmap(); !slices.Contains(r.addrs, addr) {
			r.addrs = append(r.addrs, addr)
		}
	}
	return r, nil
}

// read reads one file.
func read(path string) (*result, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxSize {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r, err := parse(b)
	if r != nil {
		r.written = info.ModTime()
	}
	return r, err
}
