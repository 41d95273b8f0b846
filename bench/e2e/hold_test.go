package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/bench/lab"
)

// podCIDRs are the ranges of the labs' pods, of both modes.
var podCIDRs = []string{"--pod-cidr=10.1.0.0/24", "--pod-cidr=fd00:1::/64", "--pod-cidr=10.22.0.0/16", "--pod-cidr=fd00:22::/64"}

// holdWorld has a client, and a policy for db pods, of which there are none yet: they
// reach the client's port 80, and it theirs, and nothing else.
func holdWorld(t *testing.T, name string, mode lab.Mode, args ...string) *world {
	w := newWorld(t, name)
	w.pod(mode, "default/client", 11, "role=client")
	w.pod(mode, "default/web", 12, "role=web")
	const client = `[{podSelector: {matchLabels: {role: client}}}], ports: [{port: 80}]`
	w.apply("policy.yaml", policy("default/db", "{podSelector: {matchLabels: {role: db}}, policyTypes: [Ingress, Egress], "+
		"ingress: [{from: "+client+"}], egress: [{to: "+client+"}]}"))
	w.start(append(append([]string{}, podCIDRs...), args...)...)
	return w
}

// newcomer adds a pod that no manifest knows. It is on the wire when this returns: what
// a new link loses, and the neighbours' finding each other, is nothing of the gate's.
func (w *world) newcomer(mode lab.Mode, key string, number int, labels string) {
	w.Helper()
	w.pod(mode, key, number, labels)
	for _, ip := range lab.NodeIPs {
		w.until(key+" and the node see each other", func() error {
			if r := w.lab.Try(lab.Probe{From: key, To: ip, Proto: lab.ICMP, Timeout: 100 * time.Millisecond}); r.Outcome != lab.Connected {
				return r.Err
			}
			return nil
		})
	}
}

// attempt is a connection that is being tried.
type attempt struct {
	row  row
	took time.Duration
	got  lab.Result
	done chan struct{}
}

// try begins to try the rows, each once: a connection that is lost at first would
// come a second later by TCP's own repetition, which is after a probe's time.
func (w *world) try(text string) (all []*attempt) {
	w.Helper()
	start := time.Now()
	for _, r := range w.rows(text) {
		r.probe.Timeout = 900 * time.Millisecond
		a := &attempt{row: r, done: make(chan struct{})}
		all = append(all, a)
		go func() {
			defer close(a.done)
			a.got = w.lab.Try(r.probe)
			a.took = time.Since(start)
		}()
	}
	return all
}

// await compares what became of attempts with what should have.
func (w *world) await(all []*attempt, atLeast time.Duration) (wrong int) {
	w.Helper()
	for _, a := range all {
		<-a.done
		if a.got.Outcome != a.row.want {
			w.Errorf("%s: %s after %s, %v", a.row.text, a.got.Outcome, a.took, a.got.Err)
			wrong++
		}
		if a.took < atLeast {
			w.Errorf("%s: %s after %s, before the pod was known", a.row.text, a.got.Outcome, a.took)
			wrong++
		}
	}
	return wrong
}

// newcomerRows are what the policy says of a pod default/new.
const newcomerRows = `
	allow tcp  default/new    default/client:80
	allow tcp  default/client default/new:80
	deny  tcp  default/new    default/client:5978
	deny  tcp  default/client default/new:5978
	deny  udp  default/new    default/web:80
	deny  tcp  default/web    default/new:80
	deny  icmp default/new    default/web
`

// TestHeldUntilKnown: a pod's first packets wait until it is known, and are then
// judged by its policy. None is lost: the connections stand before TCP sends another
// SYN; and none passes before.
func TestHeldUntilKnown(t *testing.T) {
	t.Parallel()
	bothModes(t, "held", func(t *testing.T, name string, mode lab.Mode) {
		w := holdWorld(t, name, mode)
		w.newcomer(mode, "default/new", 20, "role=db")
		tries := w.try(newcomerRows)
		const late = 300 * time.Millisecond
		time.Sleep(late)
		w.must(w.lab.Manifests(w.dir))
		w.await(tries, late)
		w.expect(newcomerRows)
		for _, d := range w.logged(4, func(d line) bool {
			return d.Verdict == "allow" && d.LatencyNs > int64(late/2) && (d.Src.Pod == "new" || d.Dst.Pod == "new")
		}) {
			if d.Reason != "rule" || d.LatencyNs >= int64(time.Second) {
				t.Errorf("a held packet was let by for %s after %s", d.Reason, time.Duration(d.LatencyNs))
			}
		}
		w.shows("portcullis_held_packets 0")
		w.shows(`portcullis_held_packets_ended_total{end="known",verdict="allow"} 4`)
	})
}

// shows waits until /metrics has a line that begins so.
func (w *world) shows(line string) {
	w.Helper()
	w.until(line, func() error {
		page, err := w.get("/metrics")
		if err != nil {
			return err
		}
		if !strings.Contains("\n"+page, "\n"+line) {
			var like []string
			name, _, _ := strings.Cut(line, " ")
			name, _, _ = strings.Cut(name, "{")
			for l := range strings.Lines(page) {
				if strings.HasPrefix(l, name) {
					like = append(like, strings.TrimSpace(l))
				}
			}
			return fmt.Errorf("there are only %q", like)
		}
		return nil
	})
}

// TestHeldByTheCNIResult: as above, but the API never tells the pod's address: what
// makes it known is the CNI plugin's result.
func TestHeldByTheCNIResult(t *testing.T) {
	t.Parallel()
	bothModes(t, "heldcni", func(t *testing.T, name string, mode lab.Mode) {
		results := t.TempDir()
		w := holdWorld(t, name, mode, "--cni-results", results)
		w.apply("new.yaml", podManifest("new", "u-1", "role: db", "Pending"))
		w.newcomer(mode, "default/new", 20, "role=db")
		tries := w.try(newcomerRows)
		const late = 300 * time.Millisecond
		time.Sleep(late)
		w.result(results, "new", "u-1", w.lab.IPs("default/new")...)
		w.await(tries, late)
		w.expect(newcomerRows)
	})
}

// podManifest is a pod of the lab's node, with the addresses that it has by its
// status.
func podManifest(name, uid, labels, phase string, ips ...netip.Addr) string {
	var list []string
	for _, ip := range ips {
		list = append(list, fmt.Sprintf("{ip: %q}", ip))
	}
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {namespace: default, name: %s, uid: %s, labels: {%s}}\n"+
		"spec: {nodeName: %s}\nstatus: {phase: %s, podIPs: [%s]}\n", name, uid, labels, lab.NodeName, phase, strings.Join(list, ", "))
}

// result writes what a CNI plugin's result for a pod of namespace default is.
func (w *world) result(dir, name, uid string, ips ...netip.Addr) {
	w.Helper()
	var list []string
	for _, ip := range ips {
		list = append(list, fmt.Sprintf(`{"address":"%s/%d"}`, ip, ip.BitLen()))
	}
	text := fmt.Sprintf(`{"kind":"cniCacheV1","ifName":"eth0","cniArgs":[["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME",%q],["K8S_POD_UID",%q]],
		"result":{"ips":[%s]}}`, name, uid, strings.Join(list, ","))
	w.must(os.WriteFile(filepath.Join(dir, "pc-"+name+"-"+uid+"-eth0"), []byte(text), 0o600))
}

const strangerOut = `
	X tcp  default/new    default/client:80
	X tcp  default/client default/new:80
	X udp  default/new    default/web:80
	X icmp default/web    default/new
	X tcp  default/new    outside:80
	X tcp  outside        default/new:80
`

// TestNeverKnown: a pod that stays unknown is shut, or open after its time, as
// --unknown-pod says; with no policy in the cluster nothing could select it, and
// nothing waits.
func TestNeverKnown(t *testing.T) {
	t.Parallel()
	bothModes(t, "never", func(t *testing.T, name string, mode lab.Mode) {
		for _, unknown := range []string{"deny", "allow"} {
			w := holdWorld(t, name+unknown, mode, "--hold=200ms", "--unknown-pod="+unknown)
			w.host("outside", "192.0.2.9", "2001:db8::9")
			w.newcomer(mode, "default/new", 20, "role=db")
			rows := strings.ReplaceAll(strangerOut, "X", unknown)
			w.await(w.try(rows), 200*time.Millisecond)
			w.expect(rows)
			// Who is known isn't kept waiting, whatever happens to others.
			w.expect("allow tcp default/client default/web:80\nallow tcp outside default/web:80\nallow tcp default/web outside:80")
			w.until("all is logged", func() error {
				for _, d := range w.decisions() {
					if d.Verdict == unknown && d.Reason == "unknown-pod" && d.LatencyNs >= int64(200*time.Millisecond) && (d.Src.Kind == "unknown" || d.Dst.Kind == "unknown") {
						return nil
					}
				}
				return errNotYet
			})
			w.shows(`portcullis_held_packets_ended_total{end="known",verdict="allow"} 0`)
			w.remove("policy.yaml")
			w.settle(strings.ReplaceAll(strangerOut, "X", "allow"))
		}
	})
}

// TestRangesOfTheNode: the Node's spec.podCIDRs are enough, and follow it.
func TestRangesOfTheNode(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "ranges", lab.Routed)
	w.start()
	w.newcomer(lab.Routed, "default/new", 20, "")
	w.expect("allow tcp default/new b/free:80")
	w.apply("lab-nodes.yaml", fmt.Sprintf("apiVersion: v1\nkind: Node\nmetadata: {name: %s}\nspec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64']}\n"+
		"status: {addresses: [{type: InternalIP, address: 192.168.77.10}, {type: InternalIP, address: 'fd00:77::10'}]}\n", lab.NodeName))
	w.settle("deny tcp default/new b/free:80\ndeny tcp b/free default/new:80")
	w.expect(gateJudged + "deny tcp default/new b/free:80\ndeny tcp b/free default/new:80")
	page, err := w.get("/readyz?verbose")
	w.must(err)
	if want := "pod ranges: [10.1.0.0/24 fd00:1::/64], 6 addresses in them known"; !strings.Contains(page, want) {
		t.Errorf("no %q in\n%s", want, page)
	}
}

// TestEndWhileHolding: what an agent holds when it ends passes no closed gate.
func TestEndWhileHolding(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			w := holdWorld(t, "endhold"+strings.ReplaceAll(sig.String(), " ", ""), lab.Routed, "--hold=5s")
			w.newcomer(lab.Routed, "default/new", 20, "role=db")
			tries := w.try("deny tcp default/new default/client:80\ndeny udp default/web default/new:80")
			w.shows("portcullis_held_packets 4")
			_ = w.stop(sig)
			w.await(tries, 0)
			w.expect("deny tcp default/new default/client:80\nallow tcp default/web default/client:80")
		})
	}
}
