//go:build soak

package soak

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

const (
	slots    = 10
	patience = 20 * time.Second
	httpAddr = "127.0.0.1:9353"
)

// soak is one run.
type soak struct {
	*testing.T
	history
	lab      *lab.Lab
	rand     *rand.Rand
	binary   string
	dir, log string
	agent    *lab.Process
	names    int
	slowest  time.Duration  // repair
	done     map[string]int // changes of each kind

	counts  sync.Mutex
	tried   int
	allowed int // of those tried, that had to be, and were
	denied  int // the same
	unknown int
	wrong   []string
	lost    int
}

// TestSoak runs for SOAK, by default half an hour.
func TestSoak(t *testing.T) {
	length := 30 * time.Minute
	if v := os.Getenv("SOAK"); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	s := newSoak(t)
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var clients sync.WaitGroup
	for i := range 12 {
		clients.Go(func() { s.connect(ctx, rand.New(rand.NewPCG(uint64(i), 1)), uint16(10000+i*4000)) })
	}
	// In the second half nobody ends the agent, so that what it gathers shows.
	end := time.Now().Add(length)
	for time.Now().Before(end.Add(-length / 2)) {
		s.step(true)
	}
	samples := s.rest(end)
	clients.Wait()
	s.lost += s.unaccounted()
	s.report(length, samples)
}

func newSoak(t *testing.T) *soak {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	s := &soak{T: t, rand: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), done: map[string]int{}}
	s.log = filepath.Join(t.TempDir(), "decisions.log")
	s.binary = filepath.Join(t.TempDir(), "portcullis")
	build := exec.Command("go", "build", "-o", s.binary, "portcullis/cmd/portcullis")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build portcullis: %v\n%s", err, out)
	}
	var err error
	s.lab, err = lab.New("soak")
	s.must(err)
	t.Cleanup(func() {
		if t.Failed() && s.agent != nil {
			out := s.agent.Output()
			t.Logf("the agent said:\n%s", out[max(0, len(out)-20000):])
		}
		s.must(s.lab.Close())
	})
	first := state{env: map[string]string{}, pods: map[int]pod{}, policies: map[string]policy{}}
	s.change(first, func() {})
	for _, n := range namespaces {
		s.relabel(n)
	}
	for i := range slots {
		s.arrive(i)
	}
	for i := range 4 { // some of everything from the start
		p := policy{namespace: namespaces[i%3], name: fmt.Sprintf("policy%d", i), ingress: i < 3, egress: i == 3, app: pick(s.rand, apps)}
		p.in = []rule{{peers: []peer{{app: pick(s.rand, apps)}}}}
		s.setPolicy(p)
	}
	s.start()
	return s
}

func (s *soak) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// start runs an agent and waits until it is ready.
func (s *soak) start() {
	var err error
	s.agent, err = s.lab.Run(context.Background(), lab.Node, s.binary, "agent", "--manifests", s.dir, "--node", lab.NodeName,
		"--http", httpAddr, "--decision-log", s.log, "--decision-log-max-files", "1", "--decision-log-window", "2s")
	s.must(err)
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err = s.get("/readyz"); err == nil {
			return
		}
		if time.Now().After(end) {
			s.Fatalf("the agent isn't ready: %v", err)
		}
	}
}

func (s *soak) get(path string) (string, error) {
	select {
	case <-s.agent.Done():
		s.Fatalf("the agent has ended: %s", s.agent.Output())
	default:
	}
	resp, err := s.lab.HTTPClient(lab.Node).Get("http://" + httpAddr + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), err
}

// metric sums a metric over its labels.
func (s *soak) metric(name string) (sum float64) {
	text, err := s.get("/metrics")
	s.must(err)
	for line := range strings.Lines(text) {
		full, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if bare, _, _ := strings.Cut(full, "{"); bare == name {
			n, err := strconv.ParseFloat(value, 64)
			s.must(err)
			sum += n
		}
	}
	return sum
}

// unaccounted gives how many decisions the agent has neither logged nor counted as
// left out or lost. The parts are read one after the other while decisions go on, so
// it waits for a moment in which they add up.
func (s *soak) unaccounted() (missing int) {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		text, err := s.get("/metrics")
		s.must(err)
		sum := 0.0
		for line := range strings.Lines(text) {
			full, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			bare, _, _ := strings.Cut(full, "{")
			n, err := strconv.ParseFloat(value, 64)
			sign := map[string]float64{"portcullis_decisions_total": 1, "portcullis_revoked_connections_total": 1, "portcullis_decision_log_records_total": -1,
				"portcullis_decision_log_lost_total": -1, "portcullis_decision_log_omitted_total": -1, "portcullis_decision_log_held_decisions": -1}[bare]
			if err == nil {
				sum += sign * n
			}
		}
		if missing = int(sum); missing == 0 {
			return 0
		}
	}
	return missing
}

// step changes something, and waits a while.
func (s *soak) step(restarts bool) {
	kind := "policy"
	switch n := s.rand.IntN(40); {
	case n < 16:
		s.changePolicies()
	case n < 22:
		kind = "labels of a pod"
		s.relabelPod()
	case n < 26:
		kind = "labels of a namespace"
		s.relabel(pick(s.rand, namespaces))
	case n < 33:
		kind = "pod replaced"
		s.replacePod()
	case n < 36:
		kind = "damage repaired"
		s.damage()
	case !restarts:
		return
	case n < 38:
		kind = "agent restarted"
		s.restart(syscall.SIGTERM)
	default:
		kind = "agent killed"
		s.restart(syscall.SIGKILL)
	}
	s.done[kind]++
	time.Sleep(time.Duration(s.rand.IntN(2500)) * time.Millisecond)
}

func (s *soak) changePolicies() {
	next := s.now().clone()
	file := fmt.Sprintf("policy%d.yaml", s.rand.IntN(6))
	if s.rand.IntN(4) == 0 {
		delete(next.policies, file)
		s.change(next, func() { _ = os.Remove(filepath.Join(s.dir, file)) })
		return
	}
	p := randomPolicy(s.rand, slots)
	p.name = strings.TrimSuffix(file, ".yaml") // never two of one name
	s.setPolicy(p)
}

func (s *soak) setPolicy(p policy) {
	next, file := s.now().clone(), p.name+".yaml"
	next.policies[file] = p
	s.change(next, func() { s.must(lab.WriteFile(filepath.Join(s.dir, file), p.manifest())) })
}

func (s *soak) relabel(namespace string) {
	next := s.now().clone()
	next.env[namespace] = pick(s.rand, envs)
	s.change(next, func() {
		s.lab.AddNamespace(namespace, map[string]string{"env": next.env[namespace]})
		s.must(s.lab.Manifests(s.dir))
	})
}

func (s *soak) relabelPod() {
	next := s.now().clone()
	slot := s.rand.IntN(slots)
	p := next.pods[slot]
	p.app = pick(s.rand, apps)
	next.pods[slot] = p
	s.change(next, func() {
		s.must(s.lab.Label(p.key(), map[string]string{"app": p.app}))
		s.must(s.lab.Manifests(s.dir))
	})
}

// replacePod takes a pod away and gives its address to another, at once.
func (s *soak) replacePod() {
	next := s.now().clone()
	slot := s.rand.IntN(slots)
	p := next.pods[slot]
	delete(next.pods, slot)
	s.change(next, func() { s.must(s.lab.Remove(p.key())) })
	s.arrive(slot)
}

func (s *soak) arrive(slot int) {
	s.names++
	next := s.now().clone()
	p := pod{pick(s.rand, namespaces), fmt.Sprintf("pod-%d", s.names), pick(s.rand, apps), address(slot)}
	spec := lab.PodSpec{Namespace: p.namespace, Name: p.name, Labels: map[string]string{"app": p.app}, IPs: []netip.Addr{p.ip}}
	for _, at := range ports {
		spec.Ports = append(spec.Ports, lab.Port{Proto: lab.Proto(at.proto), Port: at.number})
	}
	// Who connects knows of the pod when its manifest is written; from then on the
	// agent has its second. Before, nobody asks.
	s.must(s.lab.AddPod(spec))
	s.must(s.lab.Manifests(s.dir))
	time.Sleep(window)
	next.pods[slot] = p
	s.change(next, func() {})
}

func (s *soak) damage() {
	what := pick(s.rand, []string{"ipset flush", "iptables -t mangle -F", "iptables -t mangle -F FORWARD", "iptables -t mangle -I FORWARD -j ACCEPT"})
	s.during(&s.broken, func() {
		before := s.metric("portcullis_repairs_total")
		_, err := s.lab.Command(context.Background(), lab.Node, strings.Fields(what)...)
		s.must(err)
		began := time.Now()
		for s.metric("portcullis_repairs_total") == before {
			if time.Since(began) > 3*patience {
				s.Errorf("%s: not repaired after %s", what, 3*patience)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		s.slowest = max(s.slowest, time.Since(began))
	})
}

func (s *soak) restart(sig syscall.Signal) {
	if sig == syscall.SIGTERM {
		s.lost += s.unaccounted()
	}
	s.during(&s.down, func() {
		s.must(s.agent.Signal(sig))
		_ = s.agent.Wait(patience)
		time.Sleep(time.Duration(s.rand.IntN(500)) * time.Millisecond)
		s.start()
	})
}

// connect tries one connection after the other between pods chosen at random, each
// from a port of its own, so that conntrack takes none for an earlier one.
func (s *soak) connect(ctx context.Context, r *rand.Rand, port0 uint16) {
	for n := uint16(0); ctx.Err() == nil; n = (n + 1) % 4000 {
		now := s.now()
		a, b := r.IntN(slots), r.IntN(slots)
		from, ok1 := now.pods[a]
		to, ok2 := now.pods[b]
		if !ok1 || !ok2 || a == b {
			continue
		}
		at := pick(r, ports)
		began := time.Now()
		timeout := 400 * time.Millisecond
		if yes, no := s.expected(from, to, [2]int{a, b}, at, began, began); yes && !no {
			timeout = 5 * time.Second // a busy machine is no denial
		}
		err := s.try(from, to, at, port0+n, timeout)
		ended := time.Now()
		yes, no := s.expected(from, to, [2]int{a, b}, at, began.Add(-10*time.Millisecond), ended)
		s.judge(fmt.Sprintf("%s (%s) to %s (%s) %s %d", from.key(), from.app, to.key(), to.app, at.proto, at.number), err, yes, no, began, ended)
		time.Sleep(time.Duration(r.IntN(40)) * time.Millisecond)
	}
}

func (s *soak) judge(what string, err error, yes, no bool, began, ended time.Time) {
	s.counts.Lock()
	defer s.counts.Unlock()
	s.tried++
	switch {
	case yes == no:
		s.unknown++
	case yes && err == nil:
		s.allowed++
	case no && err != nil:
		s.denied++
	default:
		s.wrong = append(s.wrong, fmt.Sprintf("%s, from %s to %s: must be allowed %v, got %v", what, began.Format(time.StampMilli), ended.Format(time.StampMilli), yes, err))
	}
}

// try connects and has a word echoed.
func (s *soak) try(from, to pod, at port, local uint16, timeout time.Duration) error {
	c, err := s.lab.OpenFrom(from.key(), lab.Proto(at.proto), netip.AddrPortFrom(from.ip, local), netip.AddrPortFrom(to.ip, at.number), timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Exchange(fmt.Sprintf("%016x", rand.Uint64()), timeout)
}

// sample is what the agent takes at one moment.
type sample struct{ rss, goroutines int }

// rest goes on with changes until the end, without ending the agent, and samples it.
func (s *soak) rest(end time.Time) (samples []sample) {
	for time.Now().Before(end) {
		s.step(false)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", s.agent.Pid()))
		s.must(err)
		pages, err := strconv.Atoi(strings.Fields(string(b))[1])
		s.must(err)
		samples = append(samples, sample{pages * os.Getpagesize(), int(s.metric("go_goroutines"))})
	}
	return samples
}

// median of one figure of some samples.
func median(samples []sample, of func(sample) int) int {
	var all []int
	for _, x := range samples {
		all = append(all, of(x))
	}
	if sort.Ints(all); all == nil {
		return 0
	}
	return all[len(all)/2]
}

func (s *soak) report(length time.Duration, samples []sample) {
	s.counts.Lock()
	defer s.counts.Unlock()
	third := len(samples) / 3
	first, last := samples[:third], samples[len(samples)-third:]
	rss, goroutines := func(x sample) int { return x.rss }, func(x sample) int { return x.goroutines }
	note := fmt.Sprintf("%d allowed, %d denied, %d within a second of a change, whatever they met; RSS %d to %d KiB, goroutines %d to %d; slowest repair %.1f s; %v",
		s.allowed, s.denied, s.unknown, median(first, rss)>>10, median(last, rss)>>10, median(first, goroutines), median(last, goroutines), s.slowest.Seconds(), s.done)
	for i, w := range s.wrong {
		if i < 20 {
			s.Errorf("wrong: %s", w)
		}
	}
	chaos.Report(s.T, chaos.Row{Fault: "soak of " + length.String(), Load: "12 clients, all pods to all", Tried: s.tried, Wrong: len(s.wrong), Lost: s.lost, Note: note})
	// Two seconds are between two looks; on a machine that is busy with other things a
	// repair takes its time, too.
	if s.slowest > 10*time.Second {
		s.Errorf("a repair took %s", s.slowest)
	}
	if s.allowed < s.tried/50 || s.denied < s.tried/50 {
		s.Errorf("of %d connections only %d had to be allowed, and %d denied", s.tried, s.allowed, s.denied)
	}
	if a, b := median(first, rss), median(last, rss); b > a+a/4+16<<20 {
		s.Errorf("the agent's memory has grown from %d to %d KiB", a>>10, b>>10)
	}
	if a, b := median(first, goroutines), median(last, goroutines); b > a+10 {
		s.Errorf("goroutines have grown from %d to %d", a, b)
	}
}
