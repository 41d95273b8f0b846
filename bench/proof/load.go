package proof

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The measured pods' ports. The policies admit clients to all but the last, which
// only a change opens, and to none beyond.
const (
	connectPort = 5000 // TCP: accepted and closed; UDP: echoed
	sinkPort    = 5002 // TCP: swallowed, then answered with the number of bytes
	changePort  = 5001 // UDP: echoed
	deniedPort  = 5003 // UDP: nobody's
)

// patience bounds how long any single connection or echo may take. A SYN that was
// lost is sent again after a second; that is a result, and longer a failure.
const patience = 3 * time.Second

// load is what a client found.
type load struct {
	LatencyNs []int64 // of each connection, in order
	Count     int     // connections or datagrams that succeeded
	Failed    int
	Resent    int // connections of which a SYN was lost and sent again
	ElapsedNs int64
	Bytes     int64
}

// resentAfter is more than a connect takes without, and less than the second after
// which a SYN is sent again.
const resentAfter = 800 * time.Millisecond

// pair is a client's address and the server's that it talks to.
type pair struct{ from, to netip.Addr }

// stopAt says when clients end: after a number of tries of each, or a time.
type stopAt struct {
	tries int
	after time.Duration
}

func (s stopAt) reached(done int, since time.Duration) bool {
	return s.tries > 0 && done >= s.tries || s.after > 0 && since >= s.after
}

// connectAll has clients connect and hang up, each in a loop on a thread of its
// own, all over the pairs in turn. Connections are reset at once, so that neither
// end keeps a port in TIME_WAIT. Only the connect itself is timed.
func connectAll(pairs []pair, clients int, stop stopAt, keep bool) load {
	results := make([]load, clients)
	var all sync.WaitGroup
	start := time.Now()
	for c := range clients {
		all.Go(func() {
			r := &results[c]
			if keep {
				r.LatencyNs = make([]int64, 0, stop.tries)
			}
			for done := 0; !stop.reached(done, time.Since(start)); done++ {
				p := pairs[(c+done*clients)%len(pairs)]
				took, err := connectOnce(p)
				if err != nil {
					r.Failed++
					continue
				}
				if took > resentAfter {
					r.Resent++
				}
				if stop.after > 0 && time.Since(start) > stop.after {
					continue // too late to count
				}
				r.Count++
				if keep {
					r.LatencyNs = append(r.LatencyNs, int64(took))
				}
			}
		})
	}
	all.Wait()
	total := load{ElapsedNs: int64(time.Since(start))}
	if stop.after > 0 {
		// A client that waits for its last connection must not make all others' time
		// longer.
		total.ElapsedNs = int64(stop.after)
	}
	for _, r := range results {
		total.Count += r.Count
		total.Failed += r.Failed
		total.Resent += r.Resent
		total.LatencyNs = append(total.LatencyNs, r.LatencyNs...)
	}
	return total
}

// connectOnce makes one TCP connection and resets it.
func connectOnce(p pair) (time.Duration, error) {
	fd, err := openFrom(p.from, unix.SOCK_STREAM)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	// Closing with no time to linger resets.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	to := &unix.SockaddrInet4{Port: connectPort, Addr: p.to.As4()}
	start := time.Now()
	err = unix.Connect(fd, to)
	return time.Since(start), err
}

// openFrom opens a blocking socket that will have the address as its source, a
// port that it chooses late, and time-outs.
func openFrom(from netip.Addr, kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	tv := unix.NsecToTimeval(int64(patience))
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}))
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}

// echoAll sends a datagram from a fresh port, again and again, and times each
// one's way there and back. With ahead, a datagram to a port that policy denies
// goes before it: the two take the same queue, so the echo comes as much later as
// the denial has taken.
func echoAll(p pair, tries int, ahead bool) load {
	var r load
	start := time.Now()
	for range tries {
		took, err := echoOnce(p, ahead)
		if err != nil {
			r.Failed++
			continue
		}
		r.Count++
		r.LatencyNs = append(r.LatencyNs, int64(took))
	}
	r.ElapsedNs = int64(time.Since(start))
	return r
}

func echoOnce(p pair, ahead bool) (time.Duration, error) {
	fd, err := openFrom(p.from, unix.SOCK_DGRAM)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Port: connectPort, Addr: p.to.As4()}
	denied := &unix.SockaddrInet4{Port: deniedPort, Addr: p.to.As4()}
	word, back := []byte("echo"), make([]byte, 16)
	start := time.Now()
	if ahead {
		if err := unix.Sendto(fd, word, 0, denied); err != nil {
			return 0, err
		}
	}
	if err := unix.Sendto(fd, word, 0, to); err != nil {
		return 0, err
	}
	_, _, err = unix.Recvfrom(fd, back, 0)
	return time.Since(start), err
}

// stream sends through one connection for a time and gives the bytes that the
// server says it has had, and how long they took.
func stream(p pair, forTime time.Duration) (load, error) {
	fd, err := openFrom(p.from, unix.SOCK_STREAM)
	if err != nil {
		return load{}, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: sinkPort, Addr: p.to.As4()}); err != nil {
		return load{}, fmt.Errorf("connect: %w", err)
	}
	block := make([]byte, 128<<10)
	start := time.Now()
	for time.Since(start) < forTime {
		if _, err := unix.Write(fd, block); err != nil {
			return load{}, fmt.Errorf("send: %w", err)
		}
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return load{}, err
	}
	count := make([]byte, 8)
	n, err := unix.Read(fd, count)
	if err != nil || n != len(count) {
		return load{}, fmt.Errorf("the server's count: %d bytes, %w", n, err)
	}
	return load{Count: 1, Bytes: int64(nativeUint64(count)), ElapsedNs: int64(time.Since(start))}, nil
}
