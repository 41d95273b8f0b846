package filter

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// What the kernel or the machine may lack. Errors of NewKernel, Install and
// Cleanup wrap them; their text is one line that says what to do.
var (
	ErrNoNetAdmin = errors.New("no CAP_NET_ADMIN: run as root, or give the container the capabilities NET_ADMIN and NET_RAW")
	ErrNoIptables = errors.New("iptables is missing")
	ErrNoNFQueue  = errors.New("the kernel has no NFQUEUE target for iptables: run modprobe xt_NFQUEUE nfnetlink_queue, or install the kernel modules package")
	ErrNoIpset    = errors.New("the kernel has no ipset: run modprobe -a ip_set ip_set_hash_ip xt_set, or install the kernel modules package")
)

// checkCapabilities looks at the calling thread's effective capabilities.
// NET_RAW is needed as well: iptables asks the kernel about ipsets, and about
// everything in its legacy backend, through a raw socket.
func checkCapabilities() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("read own capabilities: %w", err)
	}
	for _, c := range []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW} {
		if data[c/32].Effective&(1<<(c%32)) == 0 {
			return ErrNoNetAdmin
		}
	}
	return nil
}

// checkIpset asks the kernel's ipset subsystem for its version.
func checkIpset() error {
	_, _, err := netlink.IpsetProtocol()
	if errors.Is(err, unix.EPERM) {
		// The capability may be one of a user namespace that doesn't own
		// this network namespace.
		return ErrNoNetAdmin
	}
	if err != nil {
		return fmt.Errorf("%w (%w)", ErrNoIpset, err)
	}
	return nil
}

// hasIPv6 tells whether the kernel has IPv6 at all; it hasn't when started
// with ipv6.disable=1.
func hasIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}

// rehearse puts all rules in place in a network namespace of its own, which is
// gone afterwards, to learn whether this kernel and this iptables take them,
// and loads the modules that they need. Where no namespace may be made it says
// so with false; then only the installation will show.
func rehearse(cmds []*command, g gate) (done bool, err error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return false, fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return false, nil
	}
	err = rehearseHere(cmds, g)
	if back := netns.Set(home); back != nil {
		// The thread stays locked, so that no other work is done on it.
		return false, fmt.Errorf("return to own network namespace: %w", back)
	}
	runtime.UnlockOSThread()
	return true, err
}

func rehearseHere(cmds []*command, g gate) error {
	for _, c := range cmds {
		if err := errors.Join(createSet(c.fam.isolated().at(g.slot)), createSet(c.fam.pods().at(g.slot))); err != nil {
			return err
		}
		if g.unknown {
			if err := createUnknownSet(c.fam.unknown().at(g.slot)); err != nil {
				return err
			}
		}
		if _, err := c.install(g); err != nil {
			return err
		}
	}
	return nil
}

// refusal says why iptables refused a rule: what is missing is told from the
// first rule that needs it. (A rule that matches a set comes before those that
// queue.)
func refusal(spec []string, err error) error {
	text := strings.Join(spec, " ")
	switch {
	case strings.Contains(err.Error(), "Permission denied") || strings.Contains(err.Error(), "Operation not permitted"):
		return fmt.Errorf("%w (%s)", ErrNoNetAdmin, oneLine(err))
	case slices.Contains(spec, "hashlimit"):
		return fmt.Errorf("%w (%s)", errNoHashlimit, oneLine(err))
	case slices.Contains(spec, "NFQUEUE"):
		return fmt.Errorf("%w (%s)", ErrNoNFQueue, oneLine(err))
	case slices.Contains(spec, "--match-set"):
		return fmt.Errorf("%w (%s)", ErrNoIpset, oneLine(err))
	}
	return fmt.Errorf("iptables refuses the rule %q; load or install the kernel modules it needs: %s", text, oneLine(err))
}
