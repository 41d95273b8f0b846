package proof

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// burst is how many packets are read at most before verdicts go out.
const burst = 32

// rawWrite writes without telling Go's scheduler, which so can't take the thread's
// processor away in the middle of a packet. The kernel never lets a verdict wait.
func rawWrite(fd int, b []byte) {
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
}

// readBatches gives all packets that are there one verdict, of the last one's id:
// the kernel takes it for all that came before too. It can set no marks.
func (w *echoWorker) readBatches() {
	one := w.verdict(nil)
	many := slices.Clone(one)
	binary.NativeEndian.PutUint16(many[4:], batchMessage)
	for {
		n, err := w.read()
		if err != nil {
			continue
		}
		out, last := one, uint32(0)
		for got := 1; ; got++ {
			if id, ok := packetID(w.buf[:n]); ok {
				last = id
			}
			if got == burst {
				break
			}
			if n, _, err = unix.Recvfrom(w.fd, w.buf, unix.MSG_DONTWAIT); err != nil {
				break
			}
			out = many
		}
		binary.BigEndian.PutUint32(out[28:], last)
		w.write(out)
	}
}

// multiHeader is struct mmsghdr of recvmmsg(2).
type multiHeader struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

// readTogether takes what is there, at least one packet, in one call, and answers
// them all in one call, each with a verdict of its own.
func (w *echoWorker) readTogether() {
	size := len(w.buf)
	buf := make([]byte, burst*size)
	iovecs, headers := make([]unix.Iovec, burst), make([]multiHeader, burst)
	for i := range headers {
		iovecs[i].Base = &buf[i*size]
		iovecs[i].SetLen(size)
		headers[i].header.Iov = &iovecs[i]
		headers[i].header.SetIovlen(1)
	}
	var out []byte
	for range burst {
		out = w.verdict(out)
	}
	each := len(out) / burst
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(w.fd), uintptr(unsafe.Pointer(&headers[0])), burst, unix.MSG_WAITFORONE, 0, 0)
		if errno != 0 {
			continue
		}
		verdicts := 0
		for i := range int(n) {
			if id, ok := packetID(buf[i*size:][:headers[i].length]); ok {
				binary.BigEndian.PutUint32(out[verdicts*each+28:], id)
				verdicts++
			}
		}
		if verdicts > 0 {
			w.write(out[:verdicts*each])
		}
	}
}

// stages are the parts of a packet's way that a queue's reader can see, in
// nanoseconds of each packet.
type stages struct {
	// Arrive is from the packet's arrival at the node's interface, as the kernel
	// stamps it, until the reader has it: routing, conntrack, the rules before the
	// queue, the message, the wake-up and the read.
	Arrive []int64
	// Handle is the reader's own work between read and write.
	Handle []int64
	// Write is the call that gives the verdict, in which the kernel sends the packet
	// on to its destination.
	Write []int64
}

// readStamped is readOne with a look at the clock around each step. A socket that
// asks for time stamps has the kernel stamp all packets that arrive.
func (w *echoWorker) readStamped() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
	}
	if err != nil {
		panic(err)
	}
	w.out = w.verdict(nil)
	for {
		n, err := w.read()
		read := time.Now()
		if err != nil {
			continue
		}
		id, ok := packetID(w.buf[:n])
		if !ok {
			continue
		}
		binary.BigEndian.PutUint32(w.out[28:], id)
		writing := time.Now()
		w.write(w.out)
		written := time.Now()
		w.stagesLock.Lock()
		if stamp, ok := arrival(w.buf[:n]); ok {
			w.stages.Arrive = append(w.stages.Arrive, read.UnixNano()-stamp)
		}
		w.stages.Handle = append(w.stages.Handle, int64(writing.Sub(read)))
		w.stages.Write = append(w.stages.Write, int64(written.Sub(writing)))
		w.stagesLock.Unlock()
	}
}

// arrival finds the kernel's stamp (NFQA_TIMESTAMP) in a packet message, in
// nanoseconds since 1970.
func arrival(b []byte) (int64, bool) {
	for b = b[20:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[2:]) == 4 && n >= 20 {
			seconds, micros := binary.BigEndian.Uint64(b[4:]), binary.BigEndian.Uint64(b[12:])
			return int64(seconds)*1e9 + int64(micros)*1e3, true
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return 0, false
}

// printStages writes what all workers have seen as one JSON object.
func printStages(workers []*echoWorker) error {
	var all stages
	for _, w := range workers {
		w.stagesLock.Lock()
		all.Arrive = append(all.Arrive, w.stages.Arrive...)
		all.Handle = append(all.Handle, w.stages.Handle...)
		all.Write = append(all.Write, w.stages.Write...)
		w.stagesLock.Unlock()
	}
	b, err := json.Marshal(&all)
	if err == nil {
		fmt.Println(string(b))
	}
	return err
}
