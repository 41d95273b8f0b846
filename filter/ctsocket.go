package filter

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ctSocket speaks to conntrack, in the network namespace of the thread that opened
// it. It is for one goroutine.
type ctSocket struct {
	fd  int
	seq uint32
	buf []byte
	out []byte
}

func openCT() (*ctSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack netlink: %w", err)
	}
	s := &ctSocket{fd: fd, buf: make([]byte, ctMaxMessage), out: make([]byte, 0, ctBatch*ctMessageRoom)}
	// A kernel that doesn't answer must not hold the looks up for good.
	tv := unix.Timeval{Sec: ctAnswerWait}
	err = errors.Join(unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, ctDumpReadBuffer))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open conntrack netlink: %w", err), unix.Close(fd))
	}
	return s, nil
}

func (s *ctSocket) close() error { return unix.Close(s.fd) }

// receive reads until the answer to each of the requests from first to the last one
// sent is complete. What the kernel has to say in between goes to entry; how each
// request ended goes to done.
func (s *ctSocket) receive(first uint32, entry func(body []byte) error, done func(seq uint32, err error)) error {
	for open := s.seq - first + 1; open > 0; {
		n, from, err := unix.Recvfrom(s.fd, s.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read from conntrack: %w", err)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not the kernel's
		}
		for b := s.buf[:n]; len(b) > 0; {
			head := b
			m, rest, err := nextMessage(b)
			if err != nil {
				return fmt.Errorf("read from conntrack: %w", err)
			}
			b = rest
			switch m.kind {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				open--
				done(binary.NativeEndian.Uint32(head[8:12]), answerError(m.body))
			case ctMsgNew:
				if err := entry(m.body); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// answerError reads the negative errno that an answer's end begins with.
func answerError(body []byte) error {
	if len(body) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(body)); n != 0 {
		return unix.Errno(-n)
	}
	return nil
}

// send sends what is in out.
func (s *ctSocket) send() error {
	if err := unix.Sendto(s.fd, s.out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("write to conntrack: %w", err)
	}
	return nil
}

// dump calls use for the entries that are picked, and maybe for others. What a dump
// gives is what was there when it began, and isn't gone when it comes by.
func (s *ctSocket) dump(pick ctPick, use func(*ctEntry) error) error {
	s.seq++
	s.out = appendDump(s.out[:0], s.seq, pick)
	if err := s.send(); err != nil {
		return err
	}
	var ended error
	var e ctEntry
	err := s.receive(s.seq, func(body []byte) error {
		if err := parseEntry(body, &e); err != nil {
			return nil // of a family or a kind that policy knows nothing of
		}
		return use(&e)
	}, func(_ uint32, err error) { ended = err })
	switch {
	case err == nil && errors.Is(ended, unix.EINVAL):
		err = fmt.Errorf("list connections: %w (without the module nf_conntrack_netlink they can't be listed)", ended)
	case err == nil && ended != nil:
		err = fmt.Errorf("list connections: %w", ended)
	}
	return err
}

// master gives the entry of the connection that expected this one; false if it is
// gone.
func (s *ctSocket) master(child *ctEntry) (found ctEntry, ok bool, err error) {
	s.seq++
	s.out = appendGet(s.out[:0], s.seq, child)
	if err := s.send(); err != nil {
		return found, false, err
	}
	err = s.receive(s.seq, func(body []byte) error {
		ok = parseEntry(body, &found) == nil
		return nil
	}, func(uint32, error) {})
	return found, ok, err
}

// mark makes up to ctBatch changes, and says of each how it ended: with ENOENT for a
// connection that is gone.
func (s *ctSocket) mark(edits []markEdit, ended func(i int, err error)) error {
	first := s.seq + 1
	s.out = s.out[:0]
	for i := range edits {
		s.seq++
		s.out = appendMark(s.out, s.seq, &edits[i])
	}
	if err := s.send(); err != nil {
		return err
	}
	return s.receive(first, func([]byte) error { return nil }, func(seq uint32, err error) {
		if i := int(seq - first); i < len(edits) {
			ended(i, err)
		}
	})
}

// markEdit is a change of some bits of one connection's mark.
type markEdit struct {
	family      byte
	tuple, zone []byte
	bits, mask  uint32
}
