package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"portcullis/bench/lab"
)

// recordWorld has pods that no policy isolates, a host outside, and a Service of
// the database, as kube-proxy would make it.
func recordWorld(t *testing.T, name string, mode lab.Mode) *world {
	t.Helper()
	w := newWorld(t, name)
	w.pod(mode, "a/web", 11, "app=web")
	w.pod(mode, "a/db", 12, "app=db")
	w.pod(mode, "b/free", 13, "app=free")
	w.host("outside", "172.17.0.5", "fd00:17::5")
	w.command("iptables", "-t", "nat", "-A", "PREROUTING", "-d", "10.96.0.1", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", w.lab.IP4("a/db").String()+":6379")
	return w
}

const recordTraffic = `
	allow tcp  a/web   a/db:80
	allow tcp4 a/web   10.96.0.1:80
	allow udp  a/web   a/db:80
	allow icmp b/free  a/db
	allow tcp  outside a/web:80
	allow tcp  a/db    outside:80
`

// summary is a record in a line.
func (d *line) summary() string {
	end := func(kind, ip, pod string) string {
		if pod != "" {
			return pod
		}
		return kind
	}
	return fmt.Sprint(d.Verdict, " ", d.Reason, " ", d.Directions, " ", d.Protocol, " ",
		end(d.Src.Kind, d.Src.IP, d.Src.Pod), " ", end(d.Dst.Kind, d.Dst.IP, d.Dst.Pod), " ", d.Dst.Port, " ", d.Observed)
}

// summaries counts equal records.
func (w *world) summaries() map[string]int {
	w.Helper()
	all := map[string]int{}
	for _, d := range w.decisions() {
		all[d.summary()]++
	}
	return all
}

// TestRecordAll records before any policy exists, has policies suggested by that,
// and holds them against the log and the wire.
func TestRecordAll(t *testing.T) {
	for name, mode := range map[string]lab.Mode{"routed": lab.Routed, "bridged": lab.Bridged} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			recordsAll(t, recordWorld(t, "record-"+name, mode))
		})
	}
}

func recordsAll(t *testing.T, w *world) {
	w.start("--record", "all")
	w.expect(recordTraffic)
	want := map[string]int{
		"allow not-isolated [egress ingress] TCP web db 80 true":    2,
		"allow not-isolated [egress ingress] TCP web db 6379 true":  1, // after DNAT
		"allow not-isolated [egress ingress] UDP web db 80 true":    2,
		"allow not-isolated [egress ingress] ICMP free db 0 true":   1,
		"allow not-isolated [egress ingress] ICMPv6 free db 0 true": 1,
		"allow not-isolated [ingress] TCP external web 80 true":     2,
		"allow not-isolated [egress] TCP db external 80 true":       2,
	}
	w.until("all connections are recorded", func() error {
		if got := w.summaries(); fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("recorded:\n%v\nwant\n%v", got, want)
		}
		return nil
	})
	if n := w.metric("portcullis_observed_connections_total"); n != 11 || w.metric("portcullis_decision_log_records_total") != n || w.metric("portcullis_decisions_total") != 0 {
		t.Errorf("%v observed, %v written, %v decided", n, w.metric("portcullis_decision_log_records_total"), w.metric("portcullis_decisions_total"))
	}
	proposed := w.suggest("3 policies")
	if out, _, code := w.asked("replay", "--log", w.log, "--manifests", w.dir, "--policies", proposed); code != 0 || !strings.Contains(out, "0 would be denied, 0 would be allowed, 11 unchanged") {
		t.Errorf("replay ends with %d: %s", code, out)
	}
	text, err := os.ReadFile(filepath.Join(proposed, "suggested.yaml"))
	w.must(err)
	w.apply("suggested.yaml", string(text))
	w.settle(recordTraffic + `
		deny tcp a/web  b/free:80
		deny tcp b/free a/web:80
		deny tcp outside a/db:80`)
}

// suggest has policies written into a directory of their own.
func (w *world) suggest(what string) (dir string) {
	w.Helper()
	dir = w.TempDir()
	cmd := exec.Command(binary, "suggest", "--log", w.log, "--manifests", w.dir)
	var notes strings.Builder
	cmd.Stderr = &notes
	out, err := cmd.Output()
	if err != nil || notes.Len() > 0 || fmt.Sprint(strings.Count(string(out), "kind: NetworkPolicy\n"), " policies") != what {
		w.Fatalf("want %s without a note: %v\n%s%s", what, err, notes.String(), out)
	}
	w.must(os.WriteFile(filepath.Join(dir, "suggested.yaml"), out, 0o644))
	return dir
}

// TestRecordAllLogsNothingTwice has one pod isolated: what concerns it is queued
// and logged there, all else is recorded, and each connection once. What the
// queue turns away never is a connection.
func TestRecordAllLogsNothingTwice(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "once", lab.Routed)
	w.start("--record", "all")
	w.expect("allow tcp4 a/web a/db:80\nallow udp4 a/web a/db:80\ndeny udp4 b/free a/db:80\nallow tcp4 a/web b/free:80\nallow tcp4 node a/db:80\nallow tcp4 node a/web:80")
	want := map[string]int{
		"allow rule [egress ingress] TCP web db 80 false":          1,
		"allow rule [egress ingress] UDP web db 80 false":          1,
		"deny no-rule [egress ingress] UDP free db 80 false":       1,
		"allow not-isolated [egress ingress] TCP web free 80 true": 1,
	}
	w.until("each connection is logged", func() error {
		if got := w.summaries(); len(got) < len(want) {
			return fmt.Errorf("logged: %v", got)
		}
		return nil
	})
	w.accounted()
	w.must(w.stop(syscall.SIGTERM))
	got := w.summaries()
	if n := got["deny no-rule [egress ingress] UDP free db 80 false"]; n > 1 { // a datagram tried again
		got["deny no-rule [egress ingress] UDP free db 80 false"] = 1
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("logged:\n%v\nwant\n%v", got, want)
	}
}
