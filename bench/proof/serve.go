package proof

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

func nativeUint64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }

// acceptThreads is how many threads take connections.
const acceptThreads = 2

// backlog has room for all connections of a flood: a client that resets its
// connection leaves it there until it is taken, and a full backlog drops SYNs.
const backlog = 1 << 16

// serve answers on the measured ports, on all of the namespace's addresses, until
// the process is killed.
func serve() error {
	failed := make(chan error, 1)
	start := func(what string, loop func() error) {
		go func() {
			runtime.LockOSThread()
			failed <- fmt.Errorf("%s: %w", what, loop())
		}()
	}
	accept, err := listen(unix.SOCK_STREAM, connectPort)
	if err != nil {
		return err
	}
	sink, err := listen(unix.SOCK_STREAM, sinkPort)
	if err != nil {
		return err
	}
	for range acceptThreads {
		start("accept", func() error { return acceptAll(accept) })
	}
	start("sink", func() error { return sinkAll(sink) })
	for _, port := range []int{connectPort, changePort} {
		echo, err := listen(unix.SOCK_DGRAM, port)
		if err != nil {
			return err
		}
		start("echo", func() error { return echoBack(echo) })
	}
	fmt.Println(serving)
	return <-failed
}

// serving is what a role prints when it is ready.
const serving = "serving"

func listen(kind, port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, &unix.SockaddrInet4{Port: port}))
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		return 0, fmt.Errorf("listen on port %d: %w", port, err)
	}
	return fd, nil
}

// acceptAll takes connections and hangs up.
func acceptAll(fd int) error {
	for {
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			unix.Close(c)
		case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNABORTED):
			return err
		}
	}
}

// sinkAll swallows one connection after the other, and tells each at its end how
// much it has sent.
func sinkAll(fd int) error {
	buf := make([]byte, 256<<10)
	for {
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if err != nil {
			continue
		}
		var total uint64
		for {
			n, err := unix.Read(c, buf)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if n <= 0 {
				break
			}
			total += uint64(n)
		}
		_, _ = unix.Write(c, binary.NativeEndian.AppendUint64(nil, total))
		unix.Close(c)
	}
}

// echoBack sends datagrams back. What a client that has gone leaves on the socket
// as an error doesn't end it. An answer leaves from the address that was asked,
// which one socket for all addresses must be told.
func echoBack(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1); err != nil {
		return err
	}
	buf, oob := make([]byte, 2048), make([]byte, 256)
	for {
		n, control, _, from, err := unix.Recvmsg(fd, buf, oob, 0)
		if err != nil {
			continue
		}
		// The same packet info, interface zeroed, names the source of what is sent.
		if info := oob[:control]; len(info) >= unix.CmsgSpace(unix.SizeofInet4Pktinfo) {
			clear(info[unix.CmsgLen(0):][:4])
		}
		_, _ = unix.SendmsgN(fd, buf[:n], oob[:control], from, 0)
	}
}
