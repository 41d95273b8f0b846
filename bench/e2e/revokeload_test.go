package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ti-mo/conntrack"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// clients opens connections to a/db, one after the other from each of several
// goroutines, and keeps those that get through.
type clients struct {
	*world
	stop    chan struct{}
	running sync.WaitGroup
	mu      sync.Mutex
	open    map[string][]*lab.Conn // by the pod that opened them
	tried   int
	took    []time.Duration // of those that got through
}

// keepOpen is how many connections of one pod are kept.
const keepOpen = 200

func (w *world) clients(from ...string) *clients {
	c := &clients{world: w, stop: make(chan struct{}), open: map[string][]*lab.Conn{}}
	for _, who := range from {
		for _, ip := range w.lab.IPs("a/db") {
			c.running.Go(func() { c.run(who, netip.AddrPortFrom(ip, 80)) })
		}
	}
	w.Cleanup(func() {
		for _, conns := range c.open {
			for _, conn := range conns {
				conn.Close()
			}
		}
	})
	return c
}

func (c *clients) run(who string, to netip.AddrPort) {
	for {
		select {
		case <-c.stop:
			return
		default:
		}
		start := time.Now()
		conn, err := c.lab.Open(who, lab.TCP, to, 100*time.Millisecond)
		took := time.Since(start)
		c.mu.Lock()
		if c.tried++; err == nil {
			c.took = append(c.took, took)
			if c.open[who] = append(c.open[who], conn); len(c.open[who]) > keepOpen {
				c.open[who][0].Close()
				c.open[who] = c.open[who][1:]
			}
		}
		c.mu.Unlock()
		// What is revoked is never closed on the server's side, and costs a
		// descriptor there until the test ends: so not as many as could be.
		time.Sleep(5 * time.Millisecond)
	}
}

func (c *clients) end() {
	close(c.stop)
	c.running.Wait()
}

// living counts a pod's open connections on which a word comes back within the wait.
func (c *clients) living(who string, wait time.Duration) (living, all int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, conn := range c.open[who] {
		wg.Go(func() {
			if conn.Exchange("alive?", wait) == nil {
				mu.Lock()
				living++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return living, len(c.open[who])
}

// TestNoConnectionOutlivesItsPolicy changes policy up to fifty times a second under a
// load of new connections: a second after the last change none lives that it denies,
// however close to a change it was opened, and those that it allows do. However many
// changes there are, conntrack is asked a few times a second at most.
func TestNoConnectionOutlivesItsPolicy(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "outlive")
	w.pod(lab.Routed, "a/web", 11, "app=web")
	w.pod(lab.Routed, "a/db", 12, "app=db")
	w.pod(lab.Routed, "b/free", 13, "")
	admit := func(peers string) {
		w.apply("db.yaml", policy("a/db", fmt.Sprintf(`{podSelector: {matchLabels: {app: db}}, ingress: [{from: [%s]}]}`, peers)))
	}
	web, free := `{podSelector: {matchLabels: {app: web}}}`, `{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: b}}}`
	choices := []string{web, free, web + ", " + free, `{ipBlock: {cidr: 1.2.3.4/32}}`}
	admit(choices[2])
	w.start("--audit", "none")
	w.stillness()
	started := time.Now()
	looks := w.metric("portcullis_rejudge_duration_seconds_count")
	changes, refused, tried, wrong := 0, 0, 0, 0
	for round := range 4 {
		c := w.clients("a/web", "b/free")
		for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); changes++ {
			admit(choices[rand.IntN(len(choices))])
			time.Sleep(time.Duration(20+rand.IntN(100)) * time.Millisecond)
		}
		allowed, denied := "a/web", "b/free"
		admit(web)
		if round%2 == 1 {
			allowed, denied = denied, allowed
			admit(free)
		}
		stalls.after(time.Now(), time.Second)
		c.end()
		livingDenied, allDenied := c.living(denied, lab.Timeout)
		livingAllowed, allAllowed := c.living(allowed, patient)
		tried, wrong = tried+allDenied+allAllowed, wrong+livingDenied+allAllowed-livingAllowed
		if living, all := livingDenied, allDenied; living > 0 || all == 0 {
			t.Errorf("round %d: %d of %d connections of %s live on, which is denied", round, living, all, denied)
		} else {
			refused += all
		}
		if living, all := livingAllowed, allAllowed; living < all || all == 0 {
			t.Errorf("round %d: %d of %d connections of %s live, which is allowed", round, living, all, allowed)
		}
	}
	looks = w.metric("portcullis_rejudge_duration_seconds_count") - looks
	if most := time.Since(started).Seconds()/0.15 + 2; looks > most {
		t.Errorf("%v looks for %d changes, %v at most", looks, changes, most)
	}
	chaos.Report(t, chaos.Row{Fault: "policy changes under open connections", Load: fmt.Sprintf("%d changes, new connections all the while", changes),
		Tried: tried, Wrong: wrong, Lost: chaos.Unknown, Note: fmt.Sprintf("%v looks at conntrack; judged a second after the last change", looks)})
	t.Logf("%d changes, %v looks, %d connections of denied pods, none of which lived", changes, looks, refused)
}

// TestHundredThousandConnections fills conntrack's table and changes policy all the
// time: connections are revoked, and nobody who connects meanwhile notices.
func TestHundredThousandConnections(t *testing.T) {
	w := gateWorld(t, "hundredk", lab.Routed)
	w.start("--audit", "none")
	const entries = 100_000
	w.must(w.lab.Do(lab.Node, func() error { return fillTable(entries) }))
	quiet := w.latencies(func() {})
	change := 0
	relabel := func() {
		change++
		for _, namespace := range []string{"a", "b"} { // of three pods, too many to be asked for one by one
			w.lab.AddNamespace(namespace, labelMap(fmt.Sprint("turn=", change)))
		}
		w.must(w.lab.Manifests(w.dir))
	}
	w.stillness()
	before := w.metric("portcullis_rejudge_duration_seconds_count")
	busy := w.latencies(relabel)
	looks := w.metric("portcullis_rejudge_duration_seconds_count") - before
	took := w.metric("portcullis_rejudge_duration_seconds_sum")
	t.Logf("%d entries: a connect takes %v, p99 %v; while they are judged again and again (%v looks) %v, p99 %v; all looks took %.3f s",
		w.tableSize(), median(quiet), p99(quiet), looks, median(busy), p99(busy), took)
	if looks < 3 {
		t.Errorf("%v looks: the table wasn't looked at while connections were made", looks)
	}
	if median(busy) > 10*median(quiet) {
		t.Error("connections notice")
	}
	if n := w.metric("portcullis_queue_dropped_total"); n != 0 {
		t.Errorf("%v packets found a queue full", n)
	}
	held := w.hold("a/web", "a/db", 80)
	since := time.Now()
	w.remove("db.yaml")
	w.apply("none.yaml", policy("a/db", denyIngress))
	// That the second is kept with so many is held in processor time, by filter's
	// TestHundredThousandEntries.
	stalls.after(since, 3*time.Second)
	for _, c := range held {
		if c.Exchange("still?", lab.Timeout) == nil {
			t.Errorf("%s lives on after the change", c.LocalAddr())
		}
	}
}

// fillTable puts connections between nobodies into the table of the calling thread's
// network namespace.
func fillTable(n int) error {
	c, err := conntrack.Dial(nil)
	if err != nil {
		return err
	}
	defer c.Close()
	for i := range n {
		src := netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)})
		dst := netip.AddrFrom4([4]byte{10, 9, 255, byte(i >> 16)})
		if err := c.Create(conntrack.NewFlow(17, 0, src, dst, uint16(1024+i/1000), 53, 600, 0)); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) tableSize() (n int) {
	w.Helper()
	_, err := fmt.Sscan(w.command("cat", "/proc/sys/net/netfilter/nf_conntrack_count"), &n)
	w.must(err)
	return n
}

// latencies connects from a/web to a/db some hundred times, in the middle of what
// else is going on.
func (w *world) latencies(meanwhile func()) (all []time.Duration) {
	w.Helper()
	to := netip.AddrPortFrom(w.lab.IP4("a/db"), 80)
	for i := range 400 {
		if i%20 == 0 {
			meanwhile()
		}
		start := time.Now()
		c, err := w.lab.Open("a/web", lab.TCP, to, patient)
		all = append(all, time.Since(start))
		w.must(err)
		w.must(c.Conn.(*net.TCPConn).SetLinger(0))
		w.must(c.Close())
		time.Sleep(5 * time.Millisecond)
	}
	slices.Sort(all)
	return all
}

func median(sorted []time.Duration) time.Duration { return sorted[len(sorted)/2] }
func p99(sorted []time.Duration) time.Duration    { return sorted[len(sorted)*99/100] }
