package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// stream sends datagrams from one socket, until the test ends.
func (w *world) stream(from string, to netip.AddrPort) {
	w.Helper()
	c, err := w.lab.Open(from, lab.UDP, to, patient)
	w.must(err)
	stop, done := make(chan struct{}), make(chan struct{})
	w.Cleanup(func() { close(stop); <-done; c.Close() })
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				c.Write(lab.Stamp()) // which may be refused now and then
			}
		}
	}()
}

// TestAddressReuse: a pod dies and another gets its addresses. Nothing that was
// decided about the old one applies to the new: no cached verdict, no mark of a
// connection, no connection that goes on as if nothing had happened.
func TestAddressReuse(t *testing.T) {
	t.Parallel()
	bothModes(t, "reuse", func(t *testing.T, name string, mode lab.Mode) {
		for _, way := range []string{"at once", "with a gap", "by the CNI result"} {
			t.Run(way, func(t *testing.T) { reuse(t, fmt.Sprint(name, len(way)), mode, way) })
		}
	})
}

func reuse(t *testing.T, name string, mode lab.Mode, way string) {
	w := newWorld(t, name)
	w.pod(mode, "default/client", 11, "role=client")
	w.pod(mode, "default/old", 20, "role=open")
	// The old pod lets the client in by a rule, so that its connections bear the mark,
	// and the new one nobody.
	w.apply("policy.yaml", policy("default/open", "{podSelector: {matchLabels: {role: open}}, policyTypes: [Ingress, Egress], ingress: [{}], egress: [{}]}")+
		"---\n"+policy("default/shut", "{podSelector: {matchLabels: {role: shut}}, policyTypes: [Ingress, Egress]}"))
	results := t.TempDir()
	old := w.lab.IPs("default/old")
	w.result(results, "old", "default-old", old...)
	w.start(append([]string{"--cni-results", results}, podCIDRs...)...)
	w.expect("allow tcp default/client default/old:80\nallow udp default/client default/old:80\nallow tcp default/old default/client:80")
	held := w.hold("default/client", "default/old", 80)
	w.hold("default/old", "default/client", 80) // whose own end is gone with the pod
	for _, ip := range old {
		w.stream("default/client", netip.AddrPortFrom(ip, 5000)) // nobody answers it
		w.stream("default/client", netip.AddrPortFrom(ip, 80))   // answered
	}
	w.until("the streams are known to the kernel", func() error {
		if len(w.marked()) < 8 {
			return errNotYet
		}
		return nil
	})

	w.must(w.lab.Remove("default/old"))
	w.must(os.Remove(results + "/pc-old-default-old-eth0"))
	w.pod(mode, "default/new", 20, "role=shut")
	reached, err := w.lab.CountUDP("default/new", 5000)
	w.must(err)
	switch way {
	case "at once":
		w.must(w.lab.Manifests(w.dir))
	case "with a gap":
		w.apply("lab-pods.yaml", podManifest("client", "default-client", "role: client", "Running", w.lab.IPs("default/client")...))
		w.settle("deny tcp default/client default/new:80")
		w.must(w.lab.Manifests(w.dir))
	case "by the CNI result":
		// The API still takes the old pod for running, and knows no address of the new.
		w.apply("new.yaml", podManifest("new", "u-new", "role: shut", "Pending"))
		w.result(results, "new", "u-new", old...)
	}
	w.settle("deny tcp default/client default/new:80")
	w.until("the old connections are forgotten", func() error {
		if flows := w.marked(); len(flows) > 0 {
			return fmt.Errorf("%d are there: %s", len(flows), flows[0])
		}
		return nil
	})
	// What passed the gate before may still wait for the new pod's neighbour entry.
	enforced, wrong := time.Now(), 0
	for _, c := range held {
		err := c.Exchange("more", lab.Timeout)
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() || errors.Is(err, unix.ECONNRESET) {
			wrong++
			t.Errorf("a connection of the old pod, %s to %s: %v, want silence", c.LocalAddr(), c.RemoteAddr(), err)
		}
	}
	w.expect("deny tcp default/client default/new:80\ndeny udp default/client default/new:80\ndeny tcp default/new default/client:80")
	if late := reached.LastSent().Sub(enforced); late > 0 {
		wrong++
		t.Errorf("a datagram of a stream to the old pod that was sent %s after that reached the new one", late)
	}
	chaos.Report(t, chaos.Row{Fault: fmt.Sprintf("a pod's address goes to another %s, %s", way, mode), Load: "open connections, four streams of datagrams",
		Tried: len(held) + 4, Wrong: wrong, Lost: w.unaccounted()})
}
