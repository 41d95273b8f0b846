package proof

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"portcullis/bench/lab"
	"portcullis/filter"
)

// The lab's hosts: the network namespaces of all measured pods that load, and of
// all that serve. The node sees as many pairs of addresses as there are pairs of
// pods, each side behind one interface.
const (
	clientHost = "clients"
	serverHost = "servers"
)

// sideBits is the length of the prefix that a side's addresses lie in.
const sideBits = 24

// startLimit bounds how long anything may take to start.
const startLimit = 90 * time.Second

// world is a variant's lab: a node with whatever the variant puts into it, and pods
// on both sides. Only Close may be called while another method runs.
type world struct {
	variant
	lab     *lab.Lab
	self    string   // the program to start again for roles
	dir     string   // the manifests
	source  []string // the agent's flags for where the cluster's state is
	logFile string
	logRead int64 // how much of the log has been read
	gate    *lab.Process
	chains  chainSet
	pairs   int
	nice    int
}

// newWorld makes the lab and puts the variant in place; agent is its binary, self
// the program that plays roles, dir an empty directory for the world's files. What
// was made before an error is undone.
func newWorld(ctx context.Context, v variant, p Params, number int, agent, self, dir string) (_ *world, err error) {
	l, err := lab.New(fmt.Sprint("proof", number))
	if err != nil {
		return nil, err
	}
	w := &world{variant: v, lab: l, self: self, dir: filepath.Join(dir, "manifests"), source: []string{"--manifests", filepath.Join(dir, "manifests")}, logFile: filepath.Join(dir, "decisions"), pairs: p.Pairs, nice: p.Nice}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", v.name, err), l.Close())
		}
	}()
	if err := os.MkdirAll(w.dir, 0o755); err != nil {
		return nil, err
	}
	if err := w.wire(ctx); err != nil {
		return nil, err
	}
	return w, w.install(ctx, agent)
}

// wire adds both sides and starts the servers. The node reaches all addresses of a
// side by way of its first: with a neighbour for each the worlds together would
// fill the kernel's one table of neighbours, which all namespaces share.
func (w *world) wire(ctx context.Context) error {
	for host, first := range map[string]netip.Addr{clientHost: firstClient, serverHost: firstServer} {
		if err := w.lab.AddHost(host, first); err != nil {
			return err
		}
		all := netip.PrefixFrom(first, sideBits).Masked().String()
		if _, err := w.lab.Command(ctx, lab.Node, "ip", "route", "add", all, "via", first.String()); err != nil {
			return err
		}
		if _, err := w.lab.Command(ctx, host, "ip", "route", "add", "local", all, "dev", "lo"); err != nil {
			return err
		}
	}
	// As many ports as there are, since each connection takes a new one.
	if err := w.sysctl(clientHost, "ipv4/ip_local_port_range", "10000 65535"); err != nil {
		return err
	}
	for _, key := range []string{"core/somaxconn", "ipv4/tcp_max_syn_backlog"} {
		if err := w.sysctl(serverHost, key, fmt.Sprint(backlog)); err != nil {
			return err
		}
	}
	_, err := w.start(ctx, serverHost, nil, "serve")
	return err
}

// sysctl writes a setting of a namespace, by its path below /proc/sys/net.
func (w *world) sysctl(who, key, value string) error {
	return w.lab.Do(who, func() error { return os.WriteFile("/proc/sys/net/"+key, []byte(value), 0) })
}

// install puts what the variant is into the node.
func (w *world) install(ctx context.Context, agent string) error {
	switch w.kind {
	case noFilter:
		return nil
	case chainsKind:
		w.chains = chainSet{spec: w.cluster, servers: addrs(firstServer, w.pairs), clients: addrs(firstClient, w.pairs)}
		return w.rebuildChains(ctx)
	}
	if err := w.cluster.write(w.dir, w.pairs); err != nil {
		return err
	}
	if w.kind == agentKind {
		return w.startAgent(ctx, agent)
	}
	return w.inheritChains(ctx, agent)
}

// noNoise is a rate that no load reaches: the rules of the noisy queue are there, in
// the agent's chains and in those that the echoes inherit, and every packet goes by
// them to the queues that all share. What the queue itself does is measured apart.
var noNoise = strconv.Itoa(filter.MaxNoisyRate)

// startAgent runs the agent until the world is closed, and waits until it is ready.
func (w *world) startAgent(ctx context.Context, agent string) (err error) {
	argv := append(append(w.prefix(w.env), agent, "agent", "--node", lab.NodeName, "--socket", "", "--noisy-rate", noNoise), w.source...)
	if w.log {
		argv = append(argv, "--decision-log", w.logFile)
	}
	if w.gate, err = w.lab.Run(ctx, lab.Node, append(argv, w.args...)...); err != nil {
		return err
	}
	client := w.lab.HTTPClient(lab.Node)
	return w.wait(w.gate, "the agent is ready", func() bool {
		resp, err := client.Get("http://127.0.0.1:9353/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

var toQueue = regexp.MustCompile(`(-j NFQUEUE .*?)( --queue-cpu-fanout)?(?m:$)`)

// inheritChains lets the agent put its chains and sets in place, ends it hard, so
// that they stay, and puts the variant's own in its place.
func (w *world) inheritChains(ctx context.Context, agent string) (err error) {
	args := w.args
	w.args = nil
	if n := queuesOf(args); n != 0 {
		w.args = []string{"--queues", fmt.Sprint(n)}
	}
	if err := w.startAgent(ctx, agent); err != nil {
		return err
	}
	if err := w.gate.Signal(os.Kill); err != nil {
		return err
	}
	<-w.gate.Done()
	w.gate, w.args = nil, args
	if w.kind == conntrackOnly {
		return w.editRules(ctx, "-j RETURN")
	}
	if !w.fanout {
		if err := w.editRules(ctx, "$1"); err != nil {
			return err
		}
	}
	role := map[kind]string{bareEcho: "echo", callbackEcho: "callback"}[w.kind]
	w.gate, err = w.start(ctx, lab.Node, w.env, role, w.queueArgs()...)
	return err
}

// queueArgs are an echo's arguments: as many queues as the agent has unless told.
func (w *world) queueArgs() []string {
	return append([]string{"--queues", fmt.Sprint(min(runtime.NumCPU(), 4))}, w.args...)
}

// editRules puts something else in place of the rules' way to the queues.
func (w *world) editRules(ctx context.Context, instead string) error {
	rules, err := w.lab.Command(ctx, lab.Node, "iptables-save", "-t", "mangle")
	if err != nil {
		return err
	}
	if !toQueue.MatchString(rules) {
		return fmt.Errorf("the agent's rules lead to no queue: %s", rules)
	}
	return w.restore(ctx, toQueue.ReplaceAllString(rules, instead), "iptables-restore")
}

// queuesOf finds the number of queues among an echo's arguments, 0 if it isn't there.
func queuesOf(args []string) (n int) {
	for i := range args[:max(0, len(args)-1)] {
		if args[i] == "--queues" {
			fmt.Sscan(args[i+1], &n)
		}
	}
	return n
}

// restore feeds a text to a command in the node by way of a file.
func (w *world) restore(ctx context.Context, text string, argv ...string) error {
	file := w.dir + ".restore"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	_, err := w.lab.Command(ctx, lab.Node, append(argv, file)...)
	return err
}

// rebuildChains does what kube-router does at each change: read the table, write
// the sets, write the whole table under new names.
func (w *world) rebuildChains(ctx context.Context) error {
	w.chains.version ^= 1
	if _, err := w.lab.Command(ctx, lab.Node, "iptables-save", "-t", "filter"); err != nil {
		return err
	}
	if _, err := w.lab.Command(ctx, lab.Node, "ipset", "save"); err != nil {
		return err
	}
	if err := w.restore(ctx, w.chains.sets(), "ipset", "restore", "-file"); err != nil {
		return err
	}
	return w.restore(ctx, w.chains.rules(), "iptables-restore", "-w", "-T", "filter")
}

// command is the command line of a role. The Go runtime of a role never stops a
// thread in the middle of a system call.
func (w *world) command(env []string, role string, args ...string) []string {
	argv := w.prefix(append([]string{"GODEBUG=asyncpreemptoff=1"}, env...))
	return append(append(argv, w.self, roleWord, role), args...)
}

// prefix begins the command line of all that is measured.
func (w *world) prefix(env []string) []string {
	return append([]string{"nice", "-n", fmt.Sprint(w.nice), "env"}, env...)
}

// start runs a role that serves until it is ended, and waits until it is ready.
func (w *world) start(ctx context.Context, who string, env []string, role string, args ...string) (*lab.Process, error) {
	p, err := w.lab.Run(ctx, who, w.command(env, role, args...)...)
	if err != nil {
		return nil, err
	}
	return p, w.wait(p, role+" serves", func() bool { return strings.Contains(p.Output(), serving) })
}

// wait polls until something is so, or the process it depends on has ended.
func (w *world) wait(p *lab.Process, what string, so func() bool) error {
	for end := time.Now().Add(startLimit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if so() {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("ended before %s: %s", what, p.Output())
		default:
		}
	}
	return fmt.Errorf("waited in vain until %s: %s", what, p.Output())
}

// ask plays a role in the clients' namespace to its end and reads its answer. Go
// is given a processor for every client, so that none waits for another's thread,
// and no collection of garbage, of which there is none.
func (w *world) ask(ctx context.Context, answer any, role string, args ...string) error {
	env := []string{"GOMAXPROCS=64", "GOGC=off"}
	out, err := w.lab.Command(ctx, clientHost, w.command(env, role, args...)...)
	if err != nil {
		return err
	}
	return lastJSON(out, answer)
}

// lastJSON reads the last line of what a role wrote.
func lastJSON(out string, answer any) error {
	out = strings.TrimSpace(out)
	last := out[strings.LastIndexByte(out, '\n')+1:]
	if err := json.Unmarshal([]byte(last), answer); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// pairArgs tells a role which addresses to use.
func pairArgs(n int) []string {
	return []string{"-from", firstClient.String(), "-to", firstServer.String(), "-pairs", fmt.Sprint(n)}
}

// onePair tells a role the addresses of the first pair.
func onePair() []string { return pairArgs(1)[:4] }

// freeze stops the variant's process, so that it takes no time from the others.
func (w *world) freeze() error {
	if w.gate == nil {
		return nil
	}
	return w.gate.Signal(syscall.SIGSTOP)
}

// thaw lets it go on, and waits until what it has missed is made up for.
func (w *world) thaw(ctx context.Context) error {
	if w.gate == nil {
		return nil
	}
	if err := w.gate.Signal(syscall.SIGCONT); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.gate.Done():
		return fmt.Errorf("%s ended: %s", w.name, w.gate.Output())
	case <-time.After(afterThaw):
	}
	return nil
}

// afterThaw is long enough for the agent's overdue look at the kernel.
const afterThaw = 200 * time.Millisecond
