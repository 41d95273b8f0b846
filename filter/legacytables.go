package filter

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyTables watches the mangle tables of legacy iptables, which tells of no change:
// whoever changes the number of rules, or their size, is found.
type legacyTables struct {
	sockets map[int]int // by level
	last    map[int]legacyInfo
}

// legacyInfo is struct ipt_getinfo, and ip6t_getinfo, of ip_tables.h.
type legacyInfo struct {
	name       [32]byte
	validHooks uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	entries    uint32
	size       uint32
}

// legacyGetInfo is IPT_SO_GET_INFO and IP6T_SO_GET_INFO.
const legacyGetInfo = 64

func openLegacyTables() (*legacyTables, error) {
	t := &legacyTables{sockets: map[int]int{}, last: map[int]legacyInfo{}}
	for level, domain := range map[int]int{unix.IPPROTO_IP: unix.AF_INET, unix.IPPROTO_IPV6: unix.AF_INET6} {
		fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			t.close()
			return nil, fmt.Errorf("open a socket for iptables: %w", err)
		}
		t.sockets[level] = fd
	}
	t.changed()
	return t, nil
}

func (t *legacyTables) close() {
	if t == nil {
		return
	}
	for _, fd := range t.sockets {
		unix.Close(fd)
	}
}

// changed tells whether a table isn't what it was at the last time.
func (t *legacyTables) changed() (changed bool) {
	if t == nil {
		return false
	}
	for level, fd := range t.sockets {
		info := legacyInfo{}
		copy(info.name[:], mangle)
		size := uint32(unsafe.Sizeof(info))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), legacyGetInfo,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			info = legacyInfo{} // the table isn't there
		}
		changed = changed || info != t.last[level]
		t.last[level] = info
	}
	return changed
}
