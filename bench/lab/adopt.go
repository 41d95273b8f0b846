package lab

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netns"
)

// Around makes a lab out of network namespaces that others have made and will
// remove, and in which they see to the wiring: those of a real cluster. It has
// no node and no members but the adopted; Serve, Try and Do work with them.
func Around() *Lab {
	return &Lab{members: map[string]*member{}, namespaces: map[string]map[string]string{}}
}

// Adopt makes a network namespace a member of the lab. The path is that of its
// file, such as /run/netns/NAME; the addresses are those that probes of the
// member use and go to. When the lab is closed the namespace stays.
func (l *Lab) Adopt(who, path string, ips ...netip.Addr) error {
	return l.join(who, &member{ips: ips}, func() (*space, error) {
		ns, err := netns.GetFromPath(path)
		if err != nil {
			return nil, fmt.Errorf("adopt %s: open network namespace %s: %w", who, path, err)
		}
		return &space{name: path, ns: ns, foreign: true}, nil
	})
}
