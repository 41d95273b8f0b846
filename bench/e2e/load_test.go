package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// load opens new connections from one member of a lab to another at a steady rate,
// in both families in turn, whatever becomes of those before: as many wait at a time
// as have to. Each has a socket of its own and is reset once it is open.
type load struct {
	from   string
	to     []netip.AddrPort
	rate   int           // connections a second
	giveUp time.Duration // after which a connection has failed

	tried, opened, failed atomic.Int64
	resent                atomic.Int64 // opened ones of which a SYN was sent again
	longest               atomic.Int64 // ns, of the opened ones
	began                 time.Time
	lasted                time.Duration
	err                   error

	mu   sync.Mutex
	ends map[netip.AddrPort]int // of the opened ones, from where
	when map[netip.AddrPort]time.Time

	end     chan struct{}
	running sync.WaitGroup
}

// try is a connection that isn't open yet.
type try struct {
	fd    int
	since time.Time
}

// load starts one.
func (w *world) load(from, to string, port uint16, rate int, giveUp time.Duration) *load {
	w.Helper()
	l := &load{from: from, rate: rate, giveUp: giveUp, ends: map[netip.AddrPort]int{}, when: map[netip.AddrPort]time.Time{}, end: make(chan struct{}), began: time.Now()}
	for _, ip := range w.lab.IPs(to) {
		if w.hasFamily(from, ip) {
			l.to = append(l.to, netip.AddrPortFrom(ip, port))
		}
	}
	l.running.Go(func() { l.err = w.lab.Do(from, l.run) })
	w.Cleanup(func() { l.stop() })
	return l
}

// stop begins no more connections and waits for those begun.
func (l *load) stop() {
	select {
	case <-l.end:
	default:
		l.lasted = time.Since(l.began)
		close(l.end)
	}
	l.running.Wait()
}

// take gives where the connections came from that were opened since the last take,
// and how many from each.
func (l *load) take() map[netip.AddrPort]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	taken := l.ends
	l.ends = map[netip.AddrPort]int{}
	return taken
}

func (l *load) String() string {
	return fmt.Sprintf("%d tried at %.0f/s, %d opened, %d failed, %d with a SYN sent again, the longest took %s",
		l.tried.Load(), float64(l.tried.Load())/l.lasted.Seconds(), l.opened.Load(), l.failed.Load(), l.resent.Load(),
		time.Duration(l.longest.Load()).Round(time.Millisecond))
}

// run is the loop of the one thread that does it all.
func (l *load) run() error {
	var open []try
	defer func() {
		for _, t := range open {
			unix.Close(t.fd)
		}
	}()
	next, ended := time.Now(), false
	for i := 0; !ended || len(open) > 0; {
		select {
		case <-l.end:
			ended = true
		default:
		}
		for ; !ended && !time.Now().Before(next); i++ {
			t, err := begin(l.to[i%len(l.to)], firstPort+i/len(l.to)%ports)
			if errors.Is(err, unix.EADDRINUSE) {
				continue // somebody has that port
			}
			if err != nil {
				return err
			}
			l.tried.Add(1)
			open = append(open, t)
			next = next.Add(time.Second / time.Duration(l.rate))
		}
		var err error
		if open, err = l.look(open); err != nil {
			return err
		}
	}
	return nil
}

// The ports that connections come from, one after another: conntrack still knows a
// connection some seconds after it was reset, and now and then takes a new one from the
// same port for it.
const (
	firstPort = 10000
	ports     = 50000
)

// begin sends a SYN.
func begin(to netip.AddrPort, port int) (t try, err error) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: as4(to.Addr())})
	from := unix.Sockaddr(&unix.SockaddrInet4{Port: port})
	if to.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		from = &unix.SockaddrInet6{Port: port}
	}
	t = try{since: time.Now()}
	if t.fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return t, err
	}
	err = errors.Join(unix.SetsockoptLinger(t.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Bind(t.fd, from))
	if err != nil {
		unix.Close(t.fd)
		return t, err
	}
	if cerr := unix.Connect(t.fd, sa); cerr != nil && !errors.Is(cerr, unix.EINPROGRESS) {
		err = errors.Join(err, cerr)
	}
	if err != nil {
		unix.Close(t.fd)
	}
	return t, err
}

func as4(ip netip.Addr) (b [4]byte) {
	if ip.Is4() {
		b = ip.As4()
	}
	return b
}

// look takes those out that are open now, or given up.
func (l *load) look(open []try) (still []try, err error) {
	fds := make([]unix.PollFd, len(open))
	for i, t := range open {
		fds[i] = unix.PollFd{Fd: int32(t.fd), Events: unix.POLLOUT}
	}
	if _, err := unix.Poll(fds, 1); err != nil && !errors.Is(err, unix.EINTR) {
		return open, err
	}
	still = open[:0]
	for i, t := range open {
		took := time.Since(t.since)
		switch {
		case fds[i].Revents != 0:
			l.finish(t, took)
		case took > l.giveUp:
			l.failed.Add(1)
			unix.Close(t.fd)
		default:
			still = append(still, t)
		}
	}
	return still, nil
}

// finish notes what became of one connection.
func (l *load) finish(t try, took time.Duration) {
	defer unix.Close(t.fd)
	if errno, err := unix.GetsockoptInt(t.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
		l.failed.Add(1)
		return
	}
	info, err := unix.GetsockoptTCPInfo(t.fd, unix.SOL_TCP, unix.TCP_INFO)
	if err == nil && info.Total_retrans > 0 {
		l.resent.Add(1)
	}
	if int64(took) > l.longest.Load() {
		l.longest.Store(int64(took))
	}
	if sa, err := unix.Getsockname(t.fd); err == nil {
		l.mu.Lock()
		l.ends[addrPort(sa)]++
		l.when[addrPort(sa)] = t.since
		l.mu.Unlock()
	}
	l.opened.Add(1)
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// datagrams sends a datagram, each from a socket of its own, at a steady rate until
// the returned function is called, which gives how many were sent and how many have
// arrived. Nobody sends them again, so each that is lost is missing.
func (w *world) datagrams(from, to string, port uint16, rate int) (stop func() (sent, arrived int)) {
	w.Helper()
	n, err := w.lab.CountUDP(to, port)
	w.must(err)
	var sent int
	var running sync.WaitGroup
	end := make(chan struct{})
	running.Go(func() {
		err := w.lab.Do(from, func() error {
			tick := time.NewTicker(time.Second / time.Duration(rate))
			defer tick.Stop()
			for {
				for _, ip := range w.lab.IPs(to) {
					if err := sendOne(netip.AddrPortFrom(ip, port)); err != nil {
						return err
					}
					sent++
				}
				select {
				case <-end:
					return nil
				case <-tick.C:
				}
			}
		})
		if err != nil {
			w.Errorf("datagrams from %s to %s: %v", from, to, err)
		}
	})
	return func() (int, int) {
		close(end)
		running.Wait()
		for last := -1; last != n.Count(); time.Sleep(lab.Timeout) {
			last = n.Count()
		}
		return sent, n.Count()
	}
}

func sendOne(to netip.AddrPort) error {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: as4(to.Addr())})
	if to.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, []byte("once"), 0, sa)
}
