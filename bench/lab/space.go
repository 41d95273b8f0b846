package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	namePrefix = "pcl"
	netnsDir   = "/run/netns"
)

// space is a named network namespace and a netlink socket in it. A foreign one is
// somebody else's: it has no such socket, and stays when the space is removed.
type space struct {
	name    string
	ns      netns.NsHandle
	nl      *netlink.Handle
	foreign bool
}

// spaceName makes a member's name fit for a file name.
func spaceName(who string) string { return strings.ReplaceAll(who, "/", ".") }

// newSpace makes a namespace with loopback up, no duplicate address detection
// (addresses work at once), no reverse path filter and no limit on ICMP errors
// (a refusal is seen as one, however many there are).
func newSpace(name string) (*space, error) {
	s := &space{name: name, ns: netns.None()}
	if err := s.create(); err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	nl, err := netlink.NewHandleAt(s.ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink in %s: %w", name, err), s.remove())
	}
	s.nl = nl
	if err := s.setDefaults(); err != nil {
		return nil, errors.Join(err, s.remove())
	}
	return s, nil
}

// create makes the namespace from a thread that comes back to where it was; a
// thread that can't come back ends with its goroutine.
func (s *space) create() error {
	return onThread(func() error {
		ns, err := netns.NewNamed(s.name)
		if err == nil {
			s.ns = ns
		}
		return err
	})
}

func (s *space) setDefaults() error {
	for _, kv := range []struct{ key, value string }{
		{"net/ipv4/conf/all/rp_filter", "0"},
		{"net/ipv4/conf/default/rp_filter", "0"},
		{"net/ipv4/icmp_ratelimit", "0"},
		{"net/ipv6/icmp/ratelimit", "0"},
		{"net/ipv6/conf/default/accept_dad", "0"},
		{"net/ipv6/conf/all/accept_dad", "0"},
		{"net/ipv6/conf/default/accept_ra", "0"},
	} {
		if err := s.Sysctl(kv.key, kv.value); err != nil {
			return err
		}
	}
	lo, err := s.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo in %s: %w", s.name, err)
	}
	if err := s.nl.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up in %s: %w", s.name, err)
	}
	return nil
}

// Sysctl writes a sysctl of the namespace; the key is its path under /proc/sys.
func (s *space) Sysctl(key, value string) error {
	return s.do(func() error {
		// /proc/sys/net shows the namespace of the thread that opens it.
		if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl %s in %s: %w", key, s.name, err)
		}
		return nil
	})
}

// do runs fn in the namespace, on a thread of its own.
func (s *space) do(fn func() error) error {
	return onThread(func() error {
		if err := netns.Set(s.ns); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", s.name, err)
		}
		return fn()
	})
}

// onThread runs fn on a locked thread, which may change its network namespace,
// and waits for it.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		origin, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("look up the thread's network namespace: %w", err)
			return
		}
		defer origin.Close()
		err = fn()
		// A thread that can't be brought home stays locked and so ends with
		// this goroutine; nobody else ever runs on it.
		if netns.Set(origin) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// remove takes the namespace's name away; the kernel drops it, and all links
// in it, when the last socket in it is closed.
func (s *space) remove() error {
	if s.nl != nil {
		s.nl.Close()
		s.nl = nil
	}
	if s.ns.IsOpen() {
		if err := s.ns.Close(); err != nil {
			return fmt.Errorf("close network namespace %s: %w", s.name, err)
		}
	}
	if s.foreign {
		return nil
	}
	return removeNamed(s.name)
}

// removeNamed removes a namespace's name. A name that is gone is no error, nor is one on
// which nothing is mounted, as a process leaves it that dies half-way.
func removeNamed(name string) error {
	err := netns.DeleteNamed(name)
	if errors.Is(err, unix.EINVAL) {
		err = os.Remove(filepath.Join(netnsDir, name))
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", name, err)
	}
	return nil
}

// alone runs fn while no other process and no other goroutine is in alone, so that a
// namespace has one who makes or sweeps it.
func alone(fn func() error) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", netnsDir, err)
	}
	dir, err := os.Open(netnsDir)
	if err != nil {
		return fmt.Errorf("open %s: %w", netnsDir, err)
	}
	defer dir.Close() // which ends the lock too
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX)
		if err == nil {
			return fn()
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", netnsDir, err)
		}
	}
}

// sweep removes the namespaces of labs whose process is gone. It is called alone.
func sweep() error {
	names, err := filepath.Glob(filepath.Join(netnsDir, namePrefix+"*-*"))
	if err != nil {
		return fmt.Errorf("list network namespaces: %w", err)
	}
	var errs []error
	for _, path := range names {
		name := filepath.Base(path)
		digits, _, _ := strings.Cut(strings.TrimPrefix(name, namePrefix), "-")
		pid, err := strconv.Atoi(digits)
		if err != nil || pid <= 0 || unix.Kill(pid, 0) != unix.ESRCH {
			continue
		}
		errs = append(errs, removeNamed(name))
	}
	return errors.Join(errs...)
}

// addAddr adds an address that is usable at once.
func (s *space) addAddr(link netlink.Link, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := s.nl.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add %s to %s in %s: %w", p, link.Attrs().Name, s.name, err)
	}
	return nil
}

func (s *space) addRoute(r *netlink.Route) error {
	if err := s.nl.RouteAdd(r); err != nil {
		return fmt.Errorf("add route to %s in %s: %w", r.Dst, s.name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func hostNet(ip netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(ip, ip.BitLen())) }
