package filter

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// multiHeader is struct mmsghdr of recvmmsg(2).
type multiHeader struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

// inbox is memory for what one read takes from a socket: a datagram at least, and
// those that wait behind it.
type inbox struct {
	size    int // of a datagram at most, in bytes
	buf     []byte
	iovecs  []unix.Iovec
	headers []multiHeader
}

func newInbox(datagrams, size int) *inbox {
	in := &inbox{
		size: size, buf: make([]byte, datagrams*size),
		iovecs: make([]unix.Iovec, datagrams), headers: make([]multiHeader, datagrams),
	}
	for i := range in.headers {
		in.iovecs[i].Base = &in.buf[i*size]
		in.iovecs[i].SetLen(size)
		in.headers[i].header.Iov = &in.iovecs[i]
		in.headers[i].header.SetIovlen(1)
	}
	return in
}

// read waits for a datagram, for as long as the socket says, and takes what else is
// there. It gives how many there were.
func (in *inbox) read(fd int) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(in.headers))),
		uintptr(len(in.headers)), unix.MSG_WAITFORONE, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// datagram gives the i-th of those last read, as far as it fits.
func (in *inbox) datagram(i int) []byte {
	return in.buf[i*in.size:][:min(int(in.headers[i].length), in.size)]
}
