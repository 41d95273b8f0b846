package e2e

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// metric sums a metric over all its labels.
func (w *world) metric(name string) (sum float64) {
	w.Helper()
	text, err := w.get("/metrics")
	w.must(err)
	for l := range strings.Lines(text) {
		full, value, _ := strings.Cut(strings.TrimSpace(l), " ")
		if bare, _, _ := strings.Cut(full, "{"); bare != name {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		w.must(err)
		sum += n
	}
	return sum
}

// flood sends so many datagrams that the policy denies, none of which waits for
// another, and waits until each was judged or found the queue full.
func (w *world) flood(n int) {
	w.Helper()
	judged := func() int {
		return int(w.metric("portcullis_decisions_total") + w.metric("portcullis_queue_dropped_total"))
	}
	before := judged()
	c, err := w.lab.Open("b/free", lab.UDP, netip.AddrPortFrom(w.lab.IP4("a/db"), 5000), patient)
	w.must(err)
	defer c.Close()
	for range n {
		_, err := c.Write([]byte("let me in"))
		w.must(err)
	}
	w.until("all datagrams are judged", func() error {
		if got := judged() - before; got < n {
			return fmt.Errorf("%d of %d", got, n)
		}
		return nil
	})
}

// accounted waits until each decision is written, left out, held or lost, and
// gives how many are written and lost.
func (w *world) accounted() (written, lost int) {
	w.Helper()
	w.until("every decision is accounted for", func() error {
		decisions := w.metric("portcullis_decisions_total") + w.metric("portcullis_observed_connections_total") + w.metric("portcullis_revoked_connections_total")
		written, lost = int(w.metric("portcullis_decision_log_records_total")), int(w.metric("portcullis_decision_log_lost_total"))
		rest := int(w.metric("portcullis_decision_log_omitted_total") + w.metric("portcullis_decision_log_held_decisions"))
		if sum := written + lost + rest; sum != int(decisions) {
			return fmt.Errorf("%d written, %d lost, %d left out or held, of %v decisions", written, lost, rest, decisions)
		}
		return nil
	})
	return written, lost
}

// TestRepeatsAreOneRecord sends five datagrams that are denied: nothing is written
// while the window is open, and one record at the agent's end.
func TestRepeatsAreOneRecord(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "repeats", lab.Routed)
	w.start("--decision-log-window", "1h")
	w.expect("allow tcp4 a/web a/db:80") // isn't held
	w.flood(5)
	w.logged(1, func(line) bool { return true })
	w.accounted()
	if n := w.metric("portcullis_decision_log_held_decisions"); n != 5 {
		t.Errorf("%v decisions are held", n)
	}
	w.must(w.stop(syscall.SIGTERM))
	denied := w.logged(1, func(d line) bool { return d.Verdict == "deny" })[0]
	if denied.Count != 5 || denied.LastTime.Before(denied.Time) /* equal where they were read together */ || denied.Generation == 0 {
		t.Errorf("%+v", denied)
	}
}

// TestWindowEnds: a denial is told when its window ends, without anything else
// happening.
func TestWindowEnds(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "window", lab.Routed)
	w.start("--decision-log-window", "100ms")
	w.flood(1)
	w.logged(1, func(d line) bool { return d.Verdict == "deny" && d.Count == 1 })
}

// TestAuditAnnotation changes what a namespace asks of the log while the agent
// runs; cached verdicts follow too.
func TestAuditAnnotation(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "annotation", lab.Routed)
	ask := func(audit string) {
		w.apply("zz-namespace.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, annotations: {portcullis.dev/audit: "+audit+"}}\n")
	}
	const within = "allow tcp4 a/web a/db:80\ndeny udp4 a/web a/db:6379"
	ask("none")
	w.start("--audit", "denied", "--decision-log-labels", "--queues", "1") // another worker has a cache of its own
	w.expect(within + "\ndeny tcp4 b/free a/db:80\nallow tcp4 b/free b/free:80")
	w.accounted()
	for _, d := range w.decisions() {
		// The client's namespace asks for nothing, and so the flag holds for it.
		if d.Src.Namespace != "b" || d.Verdict != "deny" || d.Dst.Labels["app"] != "db" {
			t.Errorf("logged: %+v", d)
		}
	}
	generation := w.metric("portcullis_snapshot_generation")
	ask("all")
	w.until("the annotation is in force", func() error {
		if w.metric("portcullis_snapshot_generation") == generation {
			return errNotYet
		}
		return nil
	})
	w.expect(within)
	if d := w.logged(1, func(d line) bool { return d.Verdict == "allow" })[0]; !d.Cached {
		t.Errorf("the verdict wasn't a cached one: %+v", d)
	}
	w.logged(1, func(d line) bool { return d.Src.Namespace == "a" && d.Verdict == "deny" })
}

// TestLogEnds names nodes, and the block that admits who is outside.
func TestLogEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "ends")
	w.pod(lab.Routed, "a/db", 12, "app=db")
	w.host("outside", "172.17.0.5", "fd00:17::5")
	w.apply("db.yaml", policy("a/db", `{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{}, {from: [{podSelector: {}}]}], egress: [{ports: [{port: 9}]}, {to: [{ipBlock: {cidr: 172.17.0.0/16}}]}]}`))
	w.start()
	w.must(w.lab.Serve(lab.Node, lab.Port{Proto: lab.TCP, Port: 9999}))
	w.expect("allow tcp4 a/db outside:80\nallow tcp4 a/db node:9999\nallow tcp outside a/db:80")
	out := w.logged(1, func(d line) bool { return d.Dst.Kind == "external" })[0]
	if by := out.Egress.AllowedBy; by == nil || by.Rule != 1 || by.IPBlock != "172.17.0.0/16" {
		t.Errorf("%+v", out.Egress)
	}
	for _, d := range w.logged(2, func(d line) bool { return d.Src.Kind == "external" }) {
		if by := d.Ingress.AllowedBy; by == nil || by.Rule != 0 || by.IPBlock != "" {
			t.Errorf("%+v", d.Ingress)
		}
	}
}

// TestFullDisk writes the log to a disk of 64 KiB: verdicts come as without a log,
// what doesn't fit is counted, and told when there is room again.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "full", lab.Routed)
	disk := t.TempDir()
	w.must(unix.Mount("portcullis-test", disk, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { w.must(unix.Unmount(disk, unix.MNT_DETACH)) })
	w.log = filepath.Join(disk, "decisions.log")
	w.start()
	w.flood(500)
	w.expect(gateJudged)
	if written, lost := w.accounted(); written == 0 || lost == 0 {
		t.Fatalf("%d written, %d lost", written, lost)
	}
	w.must(unix.Mount("portcullis-test", disk, "tmpfs", unix.MS_REMOUNT, "size=16m"))
	w.expect(gateJudged)
	written, lost := w.accounted()
	w.until("the log tells what is missing", func() error {
		b, err := os.ReadFile(w.log)
		w.must(err)
		torn := regexp.MustCompile(`(?m)^.*~\n`)
		told, lines := 0, 0
		for _, d := range w.parse(torn.ReplaceAllString(string(b), "")) {
			told += int(d.Lost)
			lines += int(d.Count)
		}
		if told != lost || lines != written {
			return fmt.Errorf("%d of %d lost are told, %d of %d lines are there", told, lost, lines, written)
		}
		return nil
	})
}

// TestStuckSink writes the log to a pipe that nobody reads: verdicts come as
// without a log, and the agent ends, saying what is lost.
func TestStuckSink(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "stuck", lab.Routed)
	w.must(unix.Mkfifo(w.log, 0o600))
	pipe, err := os.OpenFile(w.log, os.O_RDWR, 0)
	w.must(err)
	defer pipe.Close()
	w.launch()
	w.log = filepath.Join(t.TempDir(), "nothing") // who reads the pipe to its end waits forever
	w.until("the agent is ready", func() error {
		_, err := w.get("/readyz")
		return err
	})
	w.flood(3)
	w.until("the pipe has something", func() error {
		if w.metric("portcullis_decision_log_records_total") == 0 {
			return errNotYet
		}
		return nil
	})
	w.flood(2000) // some ten times what the pipe holds
	w.expect(gateJudged)
	decisions := w.metric("portcullis_decisions_total")
	if err := w.stop(syscall.SIGTERM); err == nil {
		t.Error("the agent says nothing by its exit code")
	}
	said := regexp.MustCompile(`decision log closed" sink=file written=(\d+) lost=(\d+)`).FindStringSubmatch(w.agent.Output())
	if said == nil || !strings.Contains(w.agent.Output(), "file takes nothing") {
		t.Fatal("the agent doesn't say what is lost")
	}
	written, _ := strconv.Atoi(said[1])
	lost, _ := strconv.Atoi(said[2])
	if written == 0 || lost == 0 || written+lost != int(decisions) {
		t.Errorf("%d written, %d lost of %v decisions", written, lost, decisions)
	}
	// All that was written is there to be read; the batch that was being written
	// when the agent gave up counts as lost, and may be there in part.
	lines := bufio.NewReader(pipe)
	for range written {
		text, err := lines.ReadString('\n')
		w.must(err)
		w.validate(text)
	}
}

// TestRotatedUnderLoad rotates the log while it is written, by itself and as
// logrotate does: no line is lost, doubled or torn.
func TestRotatedUnderLoad(t *testing.T) {
	t.Parallel()
	t.Run("by itself", func(t *testing.T) {
		t.Parallel()
		w := gateWorld(t, "rotates", lab.Routed)
		w.start("--decision-log-max-size", "1", "--decision-log-max-files", "0", "--decision-log-compress")
		for range 3 {
			w.flood(2000)
		}
		w.whole("decisions*.log.gz", 1)
	})
	t.Run("by others", func(t *testing.T) {
		t.Parallel()
		w := gateWorld(t, "rotated2", lab.Routed)
		w.start("--decision-log-max-size", "0")
		done := make(chan struct{})
		var load sync.WaitGroup
		load.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				if err := os.Rename(w.log, fmt.Sprint(w.log, ".", i)); err != nil {
					time.Sleep(time.Millisecond) // there is no new file yet
					continue
				}
				if err := w.agent.Signal(syscall.SIGHUP); err != nil {
					t.Errorf("SIGHUP: %v", err)
				}
			}
		})
		w.flood(3000)
		close(done)
		load.Wait()
		w.whole("decisions.log.*", 2)
	})
}

// whole waits until all that was written is in the log's files, of which at least
// so many are rotated ones of the pattern's names.
func (w *world) whole(pattern string, rotated int) {
	w.Helper()
	written, lost := w.accounted()
	if lost != 0 {
		w.Errorf("%d of %d decisions are lost", lost, written)
	}
	w.until("all lines are in the files", func() error {
		names, err := filepath.Glob(filepath.Join(filepath.Dir(w.log), pattern))
		w.must(err)
		lines := 0
		for _, name := range append(names, w.log) {
			text, err := readLog(name)
			if err != nil {
				return err // it is being compressed
			}
			lines += len(w.parse(text))
		}
		if lines != written || len(names) < rotated {
			return fmt.Errorf("%d of %d lines in %q", lines, written, names)
		}
		return nil
	})
}

func readLog(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(name, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			return "", err
		}
	}
	b, err := io.ReadAll(r)
	return string(b), err
}
