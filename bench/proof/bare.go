package proof

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// echoConfig says which queues an echo serves and how. The zero value of all but
// the numbers is the bare echo that others are held against; each other field is
// something that was tried.
type echoConfig struct {
	base, count int
	readBuffer  int // bytes; 0 for the agent's own
	// again answers as the agent does: a mark, and through the hook once more,
	// where a plain accept would be enough for an echo.
	again bool
	// spin asks the socket for so long before it blocks.
	spin time.Duration
	// batch reads what is there, up to 32, before one verdict for them all.
	batch bool
	// together reads what is there by one recvmmsg and writes all verdicts, each
	// its own, by one send.
	together bool
	// raw writes past Go's bookkeeping of system calls.
	raw bool
	// yield goes through Go's scheduler now and then, on a thread that isn't locked
	// (unless it is pinned),
	// which keeps Go from taking the worker for one that hogs its processor: after
	// 10 ms without, its monitor looks every 20 µs whether it can take it away.
	yield bool
	// pin keeps worker i on CPU i.
	pin bool
	// slice is the worker's time slice; 0 for the kernel's own (3 ms or so).
	slice time.Duration
	// stamps measures the stages of a packet's way, and tells at the end.
	stamps bool
}

// yieldEvery is well below the 10 ms after which Go wants a processor back.
const yieldEvery = 2 * time.Millisecond

// What the agent asks the kernel for, and so the echoes too.
const (
	copyRange  = 512
	queueLen   = 4096
	readBuffer = 8 << 20
	acceptMark = 0x1000
)

// NFQUEUE's messages, as include/uapi/linux/netfilter/nfnetlink_queue.h has them.
const (
	packetMessage  = unix.NFNL_SUBSYS_QUEUE << 8
	verdictMessage = unix.NFNL_SUBSYS_QUEUE<<8 | 1
	configMessage  = unix.NFNL_SUBSYS_QUEUE<<8 | 2
	batchMessage   = unix.NFNL_SUBSYS_QUEUE<<8 | 3

	plainVerdictLen  = 32
	markedVerdictLen = 40
)

// echo serves queues until a SIGTERM, a thread to each.
func echo(cfg echoConfig) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	var all []*echoWorker
	for i := range cfg.count {
		w, err := newEchoWorker(cfg, uint16(cfg.base+i))
		if err != nil {
			return err
		}
		all = append(all, w)
		go w.run(i)
	}
	fmt.Println(serving)
	<-end
	if cfg.stamps {
		return printStages(all)
	}
	return nil
}

type echoWorker struct {
	cfg   echoConfig
	conn  *netlink.Conn
	fd    int
	queue uint16
	buf   []byte
	out   []byte

	stagesLock sync.Mutex
	stages     stages
}

// newEchoWorker binds a queue by go-nfqueue's socket, which it then owns.
func newEchoWorker(cfg echoConfig, queue uint16) (*echoWorker, error) {
	nfq, err := nfqueue.Open(&nfqueue.Config{NfQueue: queue})
	if err != nil {
		return nil, fmt.Errorf("open a socket for queue %d: %w", queue, err)
	}
	w := &echoWorker{cfg: cfg, conn: nfq.Con, queue: queue, buf: make([]byte, copyRange+1024)}
	buffer := cfg.readBuffer
	if buffer == 0 {
		buffer = readBuffer
	}
	if err := w.bind(buffer); err != nil {
		return nil, fmt.Errorf("bind queue %d: %w", queue, err)
	}
	return w, nil
}

// bind asks for what the agent asks for.
func (w *echoWorker) bind(buffer int) error {
	flags := binary.BigEndian.AppendUint32(nil, nfqueue.NfQaCfgFlagGSO)
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: 1, Data: []byte{1, 0, 0, 0}}, // bind
		{Type: 3, Data: binary.BigEndian.AppendUint32(nil, queueLen)},
		{Type: 4, Data: flags}, {Type: 5, Data: flags},
		{Type: 2, Data: append(binary.BigEndian.AppendUint32(nil, copyRange), nfqueue.NfQnlCopyPacket)},
	})
	if err != nil {
		return err
	}
	_, err = w.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: configMessage, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append([]byte{0, 0, byte(w.queue >> 8), byte(w.queue)}, attrs...),
	})
	if err == nil {
		err = w.conn.SetReadBuffer(buffer)
	}
	if err == nil {
		err = w.conn.SetOption(netlink.NoENOBUFS, true)
	}
	return err
}

// takeSlice gives the calling thread another slice (sched_setattr(2)).
func takeSlice(d time.Duration) error {
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		return err
	}
	attr.Runtime = uint64(d)
	return unix.SchedSetAttr(0, attr, 0)
}

// run takes the socket away from Go's poller and serves it for good.
func (w *echoWorker) run(number int) {
	if !w.cfg.yield || w.cfg.pin {
		runtime.LockOSThread()
	}
	if w.cfg.pin {
		var cpus unix.CPUSet
		cpus.Set(number % runtime.NumCPU())
		if err := unix.SchedSetaffinity(0, &cpus); err != nil {
			panic(err)
		}
	}
	if w.cfg.slice > 0 {
		if err := takeSlice(w.cfg.slice); err != nil {
			panic(err)
		}
	}
	raw, err := w.conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			w.fd = int(fd)
			if err := unix.SetNonblock(w.fd, false); err != nil {
				panic(err)
			}
			switch {
			case w.cfg.together:
				w.readTogether()
			case w.cfg.batch:
				w.readBatches()
			case w.cfg.stamps:
				w.readStamped()
			default:
				w.readOne()
			}
		})
	}
	panic(err)
}

// readOne is the bare loop: a message in, its verdict out.
func (w *echoWorker) readOne() {
	w.out = w.verdict(nil)
	yielded := time.Now()
	for {
		n, err := w.read()
		if w.cfg.yield && time.Since(yielded) > yieldEvery {
			runtime.Gosched()
			yielded = time.Now()
		}
		if err != nil {
			continue
		}
		if id, ok := packetID(w.buf[:n]); ok {
			binary.BigEndian.PutUint32(w.out[28:], id)
			w.write(w.out)
		}
	}
}

// read blocks, after asking for as long as the configuration says.
func (w *echoWorker) read() (int, error) {
	if w.cfg.spin > 0 {
		for start := time.Now(); time.Since(start) < w.cfg.spin; {
			if n, _, err := unix.Recvfrom(w.fd, w.buf, unix.MSG_DONTWAIT); err == nil {
				return n, nil
			}
		}
	}
	return unix.Read(w.fd, w.buf)
}

// write hands a verdict to the kernel, which sends the packet on within the call.
func (w *echoWorker) write(b []byte) {
	if w.cfg.raw {
		rawWrite(w.fd, b)
		return
	}
	_, _ = unix.Write(w.fd, b)
}

// packetID finds a packet message's id: its header is the first attribute.
func packetID(b []byte) (uint32, bool) {
	if len(b) < 28 || binary.NativeEndian.Uint16(b[4:]) != packetMessage {
		return 0, false
	}
	return binary.BigEndian.Uint32(b[24:]), true
}

// verdict appends a verdict message whose id is still to be filled in.
func (w *echoWorker) verdict(b []byte) []byte {
	at := len(b)
	b = append(b, make([]byte, plainVerdictLen)...)
	m := b[at:]
	binary.NativeEndian.PutUint32(m, plainVerdictLen)
	binary.NativeEndian.PutUint16(m[4:], verdictMessage)
	binary.NativeEndian.PutUint16(m[6:], unix.NLM_F_REQUEST)
	binary.BigEndian.PutUint16(m[18:], w.queue)
	binary.NativeEndian.PutUint16(m[20:], 12)
	binary.NativeEndian.PutUint16(m[22:], 2) // NFQA_VERDICT_HDR
	binary.BigEndian.PutUint32(m[24:], nfqueue.NfAccept)
	if w.cfg.again {
		binary.NativeEndian.PutUint32(m, markedVerdictLen)
		binary.BigEndian.PutUint32(m[24:], nfqueue.NfRepeat)
		b = binary.NativeEndian.AppendUint16(b, 8)
		b = binary.NativeEndian.AppendUint16(b, 3) // NFQA_MARK
		b = binary.BigEndian.AppendUint32(b, acceptMark)
	}
	return b
}
