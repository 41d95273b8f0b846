package filter

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// setCounter asks for the numbers of sets' members. It does so ten times a second for
// as long as the agent runs, so it allocates nothing. It is for one goroutine.
type setCounter struct {
	fd   int
	seq  uint32
	buf  []byte
	asks map[string][]byte // the requests, by the sets' names
}

// setCounterWait is how long an answer may take, in seconds.
const setCounterWait = 1

// openSetCounter opens one in the network namespace of the calling thread.
func openSetCounter() (*setCounter, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open ipset netlink: %w", err)
	}
	tv := unix.Timeval{Sec: setCounterWait}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		return nil, errors.Join(fmt.Errorf("open ipset netlink: %w", err), unix.Close(fd))
	}
	return &setCounter{fd: fd, buf: make([]byte, 32<<10), asks: map[string][]byte{}}, nil
}

func (c *setCounter) close() {
	if c != nil {
		unix.Close(c.fd)
	}
}

// size gives the number of a set's members, or an error, ENOENT if there is no such set.
func (c *setCounter) size(set memberSet) (members int, err error) {
	ask, ok := c.asks[set.name]
	if !ok {
		ask = appendListHeader(nil, set)
		c.asks[set.name] = ask
	}
	c.seq++
	binary.NativeEndian.PutUint32(ask[8:12], c.seq)
	// A netlink socket that isn't connected writes to the kernel.
	if _, err := unix.Write(c.fd, ask); err != nil {
		return 0, err
	}
	members = -1
	for {
		n, err := unix.Read(c.fd, c.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		ended, err := c.datagram(c.buf[:n], &members)
		if err != nil {
			return 0, err
		}
		if ended && members < 0 {
			return 0, errNoSize
		}
		if ended {
			return members, nil
		}
	}
}

var errNoSize = errors.New("the kernel doesn't tell the size of an ipset")

// datagram reads what one read brought, and tells whether the answer has ended. What
// belongs to an earlier request, which wasn't waited for, is passed over.
func (c *setCounter) datagram(b []byte, members *int) (ended bool, err error) {
	for len(b) > 0 {
		head := b
		m, rest, err := nextMessage(b)
		if err != nil {
			return false, err
		}
		b = rest
		if binary.NativeEndian.Uint32(head[8:12]) != c.seq {
			continue
		}
		switch m.kind {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			return true, answerError(m.body)
		case ipsetList:
			if n, ok := parseSetSize(m.body); ok {
				*members = n
			}
		}
	}
	return false, nil
}

// parseSetSize finds the number of members in a message of a listing.
func parseSetSize(body []byte) (members int, ok bool) {
	if len(body) < nfGenLen {
		return 0, false
	}
	for b := body[nfGenLen:]; len(b) > 0; {
		kind, v, rest, err := nextAttr(b)
		if err != nil {
			return 0, false
		}
		b = rest
		for kind == ipsetAttrData && len(v) > 0 {
			inner, number, rest, err := nextAttr(v)
			if err != nil {
				return 0, false
			}
			v = rest
			if inner == ipsetAttrElements && len(number) == 4 {
				return int(binary.BigEndian.Uint32(number)), true
			}
		}
	}
	return 0, false
}

// appendListHeader is the request for a set's listing without its members.
func appendListHeader(b []byte, set memberSet) []byte {
	af := byte(unix.AF_INET)
	if set.fam == 6 {
		af = unix.AF_INET6
	}
	from := len(b)
	b = beginMessage(b, ipsetList, unix.NLM_F_DUMP, 0, af)
	b = appendAttr(b, ipsetAttrProtocol, []byte{ipsetProtocol})
	b = appendAttr(b, ipsetAttrSetname, append([]byte(set.name), 0))
	b = appendAttr(b, ipsetAttrListFlags|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint32(nil, ipsetListHeader))
	endMessage(b, from)
	return b
}
