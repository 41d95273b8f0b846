package proof

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// probeEvery is how often a watch asks; after a while it asks less often, so
	// that many slow changes don't become a load of their own: in a fiftieth of the
	// time passed.
	probeEvery = 2 * time.Millisecond
	// grace is how long an echo may take until its datagram counts as denied.
	grace = 100 * time.Millisecond
)

var errNoChange = errors.New("nothing changed in time")

// probeSent is a datagram on its way, from a port of its own.
type probeSent struct {
	fd   int
	sent time.Time
}

// watchFor sends datagrams from fresh ports until their fate is the wanted one,
// and gives the moment from which on it was. Of admission that is the first echo's
// arrival. Of denial it is the sending of the first datagram that had no echo,
// after the last that had one: later than the change by at most probeEvery or a
// fiftieth.
func watchFor(p pair, port int, admitted bool, limit time.Duration) (time.Time, error) {
	var open []probeSent
	defer func() {
		for _, o := range open {
			unix.Close(o.fd)
		}
	}()
	start := time.Now()
	for time.Since(start) < limit {
		sent, err := sendProbe(p, port)
		if err != nil {
			return time.Time{}, err
		}
		open = append(open, sent)
		time.Sleep(max(probeEvery, time.Since(start)/50))
		answered := takeEchoes(&open)
		switch {
		case answered && admitted:
			return time.Now(), nil
		case !admitted && len(open) > 0 && time.Since(open[0].sent) > grace:
			return open[0].sent, nil
		case admitted && len(open) > 0 && time.Since(open[0].sent) > grace:
			unix.Close(open[0].fd)
			open = open[1:]
		}
	}
	return time.Time{}, errNoChange
}

func sendProbe(p pair, port int) (probeSent, error) {
	fd, err := openFrom(p.from, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK)
	if err != nil {
		return probeSent{}, err
	}
	o := probeSent{fd, time.Now()}
	if err := unix.Sendto(fd, []byte("probe"), 0, &unix.SockaddrInet4{Port: port, Addr: p.to.As4()}); err != nil {
		unix.Close(fd)
		return probeSent{}, fmt.Errorf("send a probe: %w", err)
	}
	return o, nil
}

// takeEchoes closes the datagrams that have an echo, and all older ones.
func takeEchoes(open *[]probeSent) (any bool) {
	var back [16]byte
	for i := len(*open) - 1; i >= 0; i-- {
		if n, _, err := unix.Recvfrom((*open)[i].fd, back[:], 0); err != nil || n == 0 {
			continue
		}
		for _, o := range (*open)[:i+1] {
			unix.Close(o.fd)
		}
		*open = (*open)[i+1:]
		return true
	}
	return false
}

// switched is when a watch saw what it waited for, in nanoseconds since 1970.
type switched struct{ AtNs int64 }

// runProbe is the role that watches for one change: it waits until the old state
// holds, says so, and then waits for the new.
func runProbe(f *flag.FlagSet, args []string) error {
	from := f.String("from", "", "client address")
	to := f.String("to", "", "server address")
	port := f.Int("port", changePort, "UDP port")
	admitted := f.Bool("admitted", false, "wait for admission, else for denial")
	limit := f.Duration("limit", time.Minute, "at most")
	if err := f.Parse(args); err != nil {
		return err
	}
	pairs, err := pairsFrom(*from, *to, 1)
	if err != nil {
		return err
	}
	if _, err := watchFor(pairs[0], *port, !*admitted, *limit); err != nil {
		return fmt.Errorf("the state before: %w", err)
	}
	fmt.Println(serving)
	at, err := watchFor(pairs[0], *port, *admitted, *limit)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(switched{at.UnixNano()})
}
