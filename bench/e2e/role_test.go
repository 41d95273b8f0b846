package e2e

import (
	"context"
	big "encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// roleEnv asks this program, started again in a pod, for a role instead of the
// tests: loads are processes of their own, so that neither Go's scheduler nor the
// lab's threads stand between two of them.
const roleEnv = "E2E_ROLE"

// role is what a load does.
type role struct {
	Name    string           // connect, ask or flood
	To      []netip.AddrPort // connect, ask: in turn
	Count   int              // how many at most
	Every   time.Duration    // connect: one in that time, if one was over by then
	For     time.Duration    // how long at most
	Frames  [][]byte         // flood: in turn
	Sources bool             // flood: an invented source address for each
	Scan    bool             // flood: destination ports in turn, else source ports at random
}

// found is what a load has to tell.
type found struct {
	Sent   int             // flood: frames that left
	Took   []time.Duration // connect: of each connection, sorted
	Failed int             // connect; ask: answers that never came
	Errors []string        // connect: the first few
}

func playRole(text string) int {
	var r role
	err := json.Unmarshal([]byte(text), &r)
	var f found
	if err == nil {
		switch r.Name {
		case "connect":
			f = r.connect()
		case "ask":
			f, err = r.ask()
		case "flood":
			f, err = r.flood()
		}
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(f)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "role:", err)
		return 1
	}
	return 0
}

// connect opens TCP connections one after the other and has a word echoed over
// each.
func (r *role) connect() (f found) {
	for start, n := time.Now(), 0; n < r.Count && time.Since(start) < r.For; n++ {
		began := time.Now()
		if err := exchange(r.To[n%len(r.To)]); err != nil {
			f.Failed++
			if len(f.Errors) < 5 {
				f.Errors = append(f.Errors, err.Error())
			}
		} else {
			f.Took = append(f.Took, time.Since(began))
		}
		time.Sleep(r.Every - time.Since(began))
	}
	slices.Sort(f.Took)
	return f
}

// exchange is one connection, reset at the end so that no port is left waiting.
func exchange(to netip.AddrPort) error {
	d := net.Dialer{Timeout: patient, KeepAlive: -1}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.(*net.TCPConn).SetLinger(0); err != nil {
		return err
	}
	conn := lab.Conn{Conn: c}
	return conn.Exchange("a word", patient)
}

// ask does what a resolver does: over each of its sockets it sends two questions at
// once. It waits for the answers when all are sent.
func (r *role) ask() (f found, err error) {
	conns := make([]*net.UDPConn, r.Count)
	for n := range conns {
		if conns[n], err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(r.To[n%len(r.To)])); err != nil {
			return f, err
		}
		defer conns[n].Close()
	}
	for _, c := range conns {
		for _, question := range []string{"A", "AAAA"} {
			if _, err := c.Write([]byte(question)); err != nil {
				return f, err
			}
			f.Sent++
		}
	}
	for end, buf := time.Now().Add(r.For), make([]byte, 16); len(conns) > 0; conns = conns[1:] {
		answers := map[string]bool{}
		for len(answers) < 2 {
			if err := conns[0].SetReadDeadline(end); err != nil {
				return f, err
			}
			n, err := conns[0].Read(buf)
			if err != nil {
				break
			}
			answers[string(buf[:n])] = true
		}
		f.Failed += 2 - len(answers)
	}
	return f, nil
}

// flood sends the frames as fast as it can, each with another source port, and
// with another source address if it is to be spoofed.
func (r *role) flood() (f found, err error) {
	i, err := net.InterfaceByName("eth0")
	if err != nil {
		return f, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return f, err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: i.Index}); err != nil {
		return f, err
	}
	// Frames go straight to the device, which hands them on within the call.
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
		return f, err
	}
	for start := time.Now(); f.Sent < r.Count; f.Sent++ {
		frame := r.Frames[f.Sent%len(r.Frames)]
		r.vary(frame, f.Sent)
		if _, err := unix.Write(fd, frame); err != nil && err != unix.ENOBUFS {
			return f, err
		}
		if f.Sent%64 == 0 && time.Since(start) > r.For {
			break
		}
	}
	return f, nil
}

// vary changes a TCP frame's ports and addresses, and its checksums with them:
// conntrack looks at those.
func (r *role) vary(frame []byte, n int) {
	const ether = 14
	ip := frame[ether:]
	v4 := ip[0]>>4 == 4
	transport, src := ip[40:], ip[8:24]
	if v4 {
		transport, src = ip[20:], ip[12:16]
	}
	sum := transport[16:18]
	if r.Scan {
		exchangeWord(transport[2:4], uint16(n/len(r.Frames)), sum)
	} else {
		exchangeWord(transport[0:2], uint16(1024+rand.N(64000)), sum)
	}
	if !r.Sources {
		return
	}
	for at := 2; at < len(src); at += 2 { // the first word says what kind of address it is
		word, old := uint16(1+rand.N(65000)), [2]byte(src[at:at+2])
		exchangeWord(src[at:at+2], word, sum)
		if v4 {
			copy(src[at:], old[:])
			exchangeWord(src[at:at+2], word, ip[10:12])
		}
	}
}

// exchangeWord puts another word in place and brings an Internet checksum up to
// date (RFC 1624).
func exchangeWord(at []byte, word uint16, checksum []byte) {
	s := uint32(^big.BigEndian.Uint16(checksum)) + uint32(^big.BigEndian.Uint16(at)) + uint32(word)
	s = s&0xffff + s>>16
	big.BigEndian.PutUint16(checksum, ^uint16(s&0xffff+s>>16))
	big.BigEndian.PutUint16(at, word)
}

// begin starts a role in a pod, and the function waits for what it found.
func (w *world) begin(who string, r role) func() found {
	w.Helper()
	text, err := json.Marshal(r)
	w.must(err)
	p, err := w.lab.Run(context.Background(), who, "env", roleEnv+"="+string(text), os.Args[0])
	w.must(err)
	return func() (f found) {
		w.Helper()
		if err := p.Wait(r.For + 3*patient); err != nil {
			w.Fatalf("%s in %s: %v: %s", r.Name, who, err, p.Output())
		}
		w.must(json.NewDecoder(strings.NewReader(p.Output())).Decode(&f))
		return f
	}
}

// at gives the duration that so many of a hundred were within.
func (f found) at(percent float64) time.Duration {
	if len(f.Took) == 0 {
		return 0
	}
	return f.Took[min(int(float64(len(f.Took))*percent/100), len(f.Took)-1)]
}
