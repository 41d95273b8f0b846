package filter

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"portcullis/filter/audit"
	"portcullis/verdict"
)

// Real-kernel tests. Each runs in a network namespace of its own, on loopback
// alone; the namespace goes with the test's thread and sockets.

// queueNetns moves the test's goroutine into a new network namespace for the
// rest of the test. The thread is never unlocked, so that Go throws it away.
func queueNetns(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("a network namespace of its own (the test needs root): %v", err)
	}
	queueRun(t, `
		ip link set lo up
		ip addr add fd00::1/128 dev lo nodad
		ip addr add fd00::2/128 dev lo nodad`)
}

// queueRun runs commands, one a line, in the test's namespace.
func queueRun(t *testing.T, script string) string {
	t.Helper()
	var out strings.Builder
	for line := range strings.Lines(script) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		b, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.TrimSpace(line), err, b)
		}
		out.Write(b)
	}
	return out.String()
}

// queueLoopback judges 127.0.0.2 and fd00::2 as one pod, which is isolated in
// ingress and open for UDP 9000 and TCP 9000.
func queueLoopback() *verdict.Engine {
	pod := &verdict.Endpoint{Namespace: "a", Name: "db", Judged: true, Meaning: 1,
		Ingress: verdict.NewTable([]verdict.Policy{{Name: "a/p", Rules: []verdict.Rule{
			{AnyPeer: true, Ports: []verdict.PortRange{{Proto: verdict.UDP, First: 9000, Last: 9000}, {Proto: verdict.TCP, First: 9000, Last: 9000}}},
		}}}, nil, nil)}
	e := verdict.NewEngine()
	e.Swap(verdict.NewSnapshot(verdict.Input{Generation: 1, Owners: map[netip.Addr]*verdict.Endpoint{
		netip.MustParseAddr("127.0.0.2"): pod, netip.MustParseAddr("fd00::2"): pod}}, nil))
	return e
}

var queueQuiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func queueOpen(t *testing.T, cfg QueueConfig, engine *verdict.Engine, log *audit.Log) *Queues {
	t.Helper()
	q, err := OpenQueues(cfg, engine, log, queueQuiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q
}

// queueListen is a UDP socket that a test reads without waiting longer than it
// must.
func queueListen(t *testing.T, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// queueSend sends from the namespace's first address, so that nobody talks to
// himself.
func queueSend(t *testing.T, to, data string) {
	t.Helper()
	from := netip.MustParseAddr("127.0.0.1")
	if strings.HasPrefix(to, "[") {
		from = netip.MustParseAddr("fd00::1")
	}
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	c, err := d.Dial("udp", to)
	if err == nil {
		_, err = c.Write([]byte(data))
		c.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// queueReceive reads one datagram, "" if none comes within a time that only a
// failing test waits for in full.
func queueReceive(c *net.UDPConn, wait time.Duration) string {
	buf := make([]byte, 100)
	c.SetReadDeadline(time.Now().Add(wait))
	n, _ := c.Read(buf)
	return string(buf[:n])
}

// queueTotal adds up the stats of all queues.
func queueTotal(q *Queues) (all QueueStats) {
	all.Decisions = make([][verdict.VerdictCount]uint64, len(verdict.Reasons()))
	for _, s := range q.Stats() {
		all.Packets += s.Packets
		all.CacheHits += s.CacheHits
		all.VerdictErrors += s.VerdictErrors
		all.ReadErrors += s.ReadErrors
		all.Unparsed += s.Unparsed
		all.Waiting += s.Waiting
		for r, d := range s.Decisions {
			all.Decisions[r][verdict.Deny] += d[verdict.Deny]
			all.Decisions[r][verdict.Allow] += d[verdict.Allow]
		}
	}
	return all
}

// Datagrams of both families: one port is open, the other isn't; an accept adds
// its bit to the mark that the packet has and leaves the others.
func TestQueueVerdicts(t *testing.T) {
	queueNetns(t)
	families := []struct{ iptables, addr string }{{"iptables", "127.0.0.2:"}, {"ip6tables", "[fd00::2]:"}}
	for _, c := range families {
		queueRun(t, strings.ReplaceAll(`
			IPT -t mangle -A OUTPUT -p udp -m mark --mark 0x1000/0x1000 -j RETURN
			IPT -t mangle -A OUTPUT -p udp -j MARK --set-mark 0x4001
			IPT -t mangle -A OUTPUT -p udp -j NFQUEUE --queue-balance 100:101
			IPT -t mangle -A POSTROUTING -p udp -m mark --mark 0x5001 -j ACCEPT`, "IPT", c.iptables))
	}
	var lines bytes.Buffer
	log := queueLog(&lines, 64)
	q := queueOpen(t, QueueConfig{Base: 100, Count: 2, AcceptMark: 0x1000, CacheSize: 16}, queueLoopback(), log)
	for _, c := range families {
		open, shut := queueListen(t, c.addr+"9000"), queueListen(t, c.addr+"9001")
		queueSend(t, c.addr+"9001", "no")
		for range 3 {
			queueSend(t, c.addr+"9000", "yes")
			if got := queueReceive(open, 5*time.Second); got != "yes" {
				t.Errorf("%s9000: %q", c.addr, got)
			}
		}
		// One pair of addresses stays on one queue, which serves in order.
		if got := queueReceive(shut, time.Millisecond); got != "" {
			t.Errorf("%s9001 let %q through", c.addr, got)
		}
		if got := queueRun(t, c.iptables+" -t mangle -vnxL POSTROUTING"); !strings.Contains(strings.Join(strings.Fields(got), " "), " destination 3 ") {
			t.Errorf("three packets with the mark 0x5001 are expected:\n%s", got)
		}
	}
	s := queueTotal(q)
	if s.Packets != 8 || s.Decisions[verdict.ReasonRule][verdict.Allow] != 6 || s.Decisions[verdict.ReasonNoRule][verdict.Deny] != 2 ||
		s.CacheHits != 4 || s.VerdictErrors+s.ReadErrors+s.Unparsed+s.Waiting != 0 {
		t.Errorf("%+v", s)
	}
	if err := errors.Join(q.Close(), log.Close()); err != nil {
		t.Error(err)
	}
	if n := strings.Count(lines.String(), "\n"); n != 8 || strings.Count(lines.String(), `"protocol":"UDP","src":{"ip":"fd00::1","port":`) != 4 {
		t.Errorf("%d lines:\n%s", n, lines.String())
	}
}

// Segments far longer than the copy range are whole packets to the decoder, and
// the kernel needn't cut them up for the queue.
func TestQueueLongSegments(t *testing.T) {
	queueNetns(t)
	queueRun(t, "iptables -t mangle -A OUTPUT -p tcp --dport 9000 -j NFQUEUE --queue-num 100")
	q := queueOpen(t, QueueConfig{Base: 100, Count: 1, CopyRange: 80}, queueLoopback(), nil)
	l, err := net.Listen("tcp", "127.0.0.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan int64, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- -1
			return
		}
		n, _ := io.Copy(io.Discard, c)
		got <- n
	}()
	const size = 4 << 20
	c, err := net.DialTimeout("tcp", "127.0.0.2:9000", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if n := <-got; n != size {
		t.Errorf("%d bytes arrived", n)
	}
	s := queueTotal(q)
	if s.Verdicts(verdict.Deny) != 0 || s.Verdicts(verdict.Allow) == 0 || s.Packets > size/2000 {
		t.Errorf("segments were refused or cut up: %+v", s)
	}
}

// What a full queue can't take is dropped, or with fail-open accepted.
func TestQueueOverflow(t *testing.T) {
	for _, failOpen := range []bool{false, true} {
		t.Run(map[bool]string{false: "closed", true: "open"}[failOpen], func(t *testing.T) {
			queueNetns(t)
			queueRun(t, "iptables -t mangle -A OUTPUT -p udp -j NFQUEUE --queue-num 100")
			cfg, err := QueueConfig{Base: 100, Count: 1, MaxLen: 1, FailOpen: failOpen}.complete()
			if err != nil {
				t.Fatal(err)
			}
			conn, err := bindQueue(100, cfg) // and nobody reads it
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := startCopy(conn, 100, cfg.CopyRange); err != nil {
				t.Fatal(err)
			}
			in, want := queueListen(t, "127.0.0.2:9000"), ""
			if failOpen {
				want = "bc"
			}
			for _, data := range []string{"a", "b", "c"} {
				queueSend(t, "127.0.0.2:9000", data)
			}
			// Loopback delivers within the sender's system call.
			if got := queueReceive(in, 20*time.Millisecond) + queueReceive(in, 20*time.Millisecond); got != want {
				t.Errorf("%q came through, want %q", got, want)
			}
			table := openKernelTable()
			defer table.close()
			rows := table.rows()
			if len(rows) != 1 || rows[0].queue != 100 || rows[0].waiting != 1 || (rows[0].dropped == 2) == failOpen {
				t.Errorf("%+v", rows)
			}
		})
	}
}

// The socket is as it was asked for.
func TestQueueSocket(t *testing.T) {
	queueNetns(t)
	cfg, err := QueueConfig{Base: 5, Count: 1, ReadBuffer: 20 << 20}.complete()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := bindQueue(5, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !queuePolled(t, conn) {
		t.Error("Go's poller doesn't know the connection: takeOver isn't needed any more")
	}
	fd, err := takeOver(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	buffer, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	quiet, _ := unix.GetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_NO_ENOBUFS)
	flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if buffer < 20<<20 || quiet != 1 || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("buffer %d, no-enobufs %d, flags %x", buffer, quiet, flags)
	}
	if inPoller(t, fd) {
		t.Error("each packet wakes Go's poller besides the worker")
	}
	if _, bound := queueOwner(5); !bound {
		t.Error("the queue went with the connection")
	}
}

// queuePolled tells whether Go's poller waits for a connection's packets.
func queuePolled(t *testing.T, conn *netlink.Conn) bool {
	t.Helper()
	fd, err := duplicate(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	return inPoller(t, fd)
}

// inPoller looks for a socket among those that this process' epoll descriptors
// wait for, by its inode.
func inPoller(t *testing.T, fd int) bool {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	infos, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		b, _ := os.ReadFile(info) // some are gone by now
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "tfd:") && strings.Contains(line+" ", fmt.Sprintf("ino:%x ", st.Ino)) {
				return true
			}
		}
	}
	return false
}

// A queue of somebody else's is named, and nothing stays bound.
func TestQueueAlreadyBound(t *testing.T) {
	queueNetns(t)
	first := queueOpen(t, QueueConfig{Base: 101, Count: 1}, verdict.NewEngine(), nil)
	cfg := QueueConfig{Base: 100, Count: 3}
	_, err := OpenQueues(cfg, verdict.NewEngine(), nil, queueQuiet)
	if err == nil || !strings.Contains(err.Error(), "queue 101 is already bound by another process") ||
		!strings.Contains(err.Error(), "--queue-base") || strings.Contains(err.Error(), "\n") {
		t.Fatalf("%v", err)
	}
	if _, bound := queueOwner(100); bound {
		t.Error("queue 100 stays bound")
	}
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	second := queueOpen(t, cfg, verdict.NewEngine(), nil)
	if n := len(second.Stats()); n != 3 {
		t.Errorf("%d queues", n)
	}
}

func TestQueueWithoutPermission(t *testing.T) {
	queueNetns(t)
	// The thread is the test's own: its capabilities go with it.
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&head, &caps[0]); err != nil {
		t.Fatal(err)
	}
	caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	if err := unix.Capset(&head, &caps[0]); err != nil {
		t.Fatal(err)
	}
	_, err := OpenQueues(QueueConfig{Base: 100, Count: 1}, verdict.NewEngine(), nil, queueQuiet)
	if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
}

func TestQueueExplainBind(t *testing.T) {
	for _, c := range []struct {
		errno syscall.Errno
		want  string
	}{
		{unix.EBUSY, "already bound"},
		{unix.EINVAL, "nfnetlink_queue"},
		{unix.EPROTONOSUPPORT, "nfnetlink_queue"},
		{unix.ENOMEM, "binding queue 65000: "},
	} {
		if err := explainBind(65000, c.errno); !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "65000") {
			t.Errorf("%v: %v", c.errno, err)
		}
	}
}

func TestQueueConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  QueueConfig
		want string
	}{
		{"no queue", QueueConfig{}, "at least one"},
		{"beyond the last", QueueConfig{Base: 65535, Count: 2}, "65536"},
		{"no burst", QueueConfig{Count: 1, Burst: -1}, "bursts of -1 packets"},
		{"burst too long", QueueConfig{Count: 1, Burst: 257}, "bursts of 257 packets"},
		{"range too short", QueueConfig{Count: 1, CopyRange: 60}, "copy range of 60"},
		{"range too long", QueueConfig{Count: 1, CopyRange: 65532}, "copy range"},
		{"negative buffer", QueueConfig{Count: 1, ReadBuffer: -1}, "receive buffer"},
		{"vast buffer", QueueConfig{Count: 1, ReadBuffer: math.MaxInt32}, "receive buffer"},
	} {
		if _, err := OpenQueues(c.cfg, verdict.NewEngine(), nil, queueQuiet); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	got, err := QueueConfig{Base: 65535, Count: 1}.complete()
	if err != nil || got.CopyRange != DefaultCopyRange || got.MaxLen != DefaultMaxLen || got.ReadBuffer != DefaultReadBuffer {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestParseKernelTable(t *testing.T) {
	rows := parseKernelTable([]byte("  100  12345     2 2   512     3     4        9  1\nnonsense\n    1 1 2\n65535 4294967295 0 2 80 0 0 0 1\n"))
	want := []kernelRow{{100, 12345, 2, 512, 2, 3, 4}, {65535, 4294967295, 2, 80, 0, 0, 0}}
	if len(rows) != 2 || rows[0] != want[0] || rows[1] != want[1] {
		t.Errorf("%+v", rows)
	}
}
