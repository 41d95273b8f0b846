package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"portcullis/bench/lab"
)

const httpAddr = "127.0.0.1:9353"

// world is a lab, the directory of manifests and the agent that reads it.
type world struct {
	*testing.T
	lab     *lab.Lab
	dir     string
	log     string // the decision log's file
	socket  string // the agent's
	agent   *lab.Process
	explain []string        // the command that answers for this world
	valid   map[string]bool // lines of the decision log that the schema admits
}

// newWorld makes an empty world that goes away with the test. A test that fails
// shows what the agent had to say.
func newWorld(t *testing.T, name string) *world {
	t.Helper()
	l, err := lab.New(name)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, lab: l, dir: t.TempDir(), log: filepath.Join(t.TempDir(), "decisions.log"), socket: filepath.Join(t.TempDir(), "agent.sock")}
	w.explain = []string{binary, "explain", "--manifests", w.dir}
	t.Cleanup(func() {
		w.validateAll()
		if t.Failed() && w.agent != nil {
			t.Logf("the agent said:\n%s", w.agent.Output())
			b, _ := os.ReadFile(w.log)
			t.Logf("decisions:\n%s", b)
			for _, show := range []string{"conntrack -L -o extended,id", "conntrack -L -f ipv6 -o extended,id", "iptables-save -c", "ip6tables-save -c", "ipset list",
				"cat /proc/thread-self/net/netfilter/nfnetlink_queue"} {
				out, err := l.Command(context.Background(), lab.Node, strings.Fields(show)...)
				t.Logf("%s:\n%s (%v)", show, out, err)
			}
		}
		w.must(l.Close())
	})
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// served is what pods serve when a test doesn't say.
var served = []lab.Port{
	{Proto: lab.TCP, Port: 80}, {Proto: lab.TCP, Port: 6379}, {Proto: lab.TCP, Port: 5978}, {Proto: lab.TCP, Port: 5979},
	{Proto: lab.UDP, Port: 80}, {Proto: lab.UDP, Port: 6379}, {Proto: lab.UDP, Port: 5978},
	{Proto: lab.SCTP, Port: 80}, {Proto: lab.SCTP, Port: 6379}, {Proto: lab.SCTP, Port: 5978},
}

// pod adds a pod. The number is the end of its addresses, one per family, in
// the range that its mode has; labels are written "key=value,key=value".
func (w *world) pod(mode lab.Mode, key string, number int, labels string, ports ...lab.Port) {
	w.Helper()
	namespace, name, _ := strings.Cut(key, "/")
	net4, net6 := "10.1.0.", "fd00:1::"
	if mode == lab.Bridged {
		net4, net6 = "10.22.0.", "fd00:22::"
	}
	if ports == nil {
		ports = served
	}
	w.must(w.lab.AddPod(lab.PodSpec{
		Namespace: namespace, Name: name, Mode: mode, Labels: labelMap(labels), Ports: ports,
		IPs: addrs(fmt.Sprint(net4, number), fmt.Sprint(net6, number)),
	}))
}

func (w *world) host(name string, ips ...string) {
	w.Helper()
	w.must(w.lab.AddHost(name, addrs(ips...)...))
	w.must(w.lab.Serve(name, served...))
}

func addrs(s ...string) (all []netip.Addr) {
	for _, a := range s {
		all = append(all, netip.MustParseAddr(a))
	}
	return all
}

func labelMap(s string) map[string]string {
	m := map[string]string{}
	for _, pair := range strings.FieldsFunc(s, func(r rune) bool { return r == ',' }) {
		k, v, _ := strings.Cut(pair, "=")
		m[k] = v
	}
	return m
}

// start runs the agent and waits until it is ready.
func (w *world) start(args ...string) {
	w.Helper()
	w.launch(args...)
	w.until("the agent is ready", func() error {
		_, err := w.get("/readyz")
		return err
	})
}

// launch writes the cluster's manifests and runs the agent on them, with a record
// for each decision unless args have it otherwise.
func (w *world) launch(args ...string) {
	w.Helper()
	w.must(w.lab.Manifests(w.dir))
	argv := []string{
		binary, "agent", "--manifests", w.dir, "--node", lab.NodeName, "--http", httpAddr, "--decision-log", w.log, "--decision-log-window", "0", "-v", "--socket", w.socket,
	}
	p, err := w.lab.Run(context.Background(), lab.Node, append(argv, args...)...)
	w.must(err)
	w.agent = p
}

// stop sends the agent a signal and waits for its end.
func (w *world) stop(sig syscall.Signal) error {
	w.Helper()
	w.must(w.agent.Signal(sig))
	select {
	case <-w.agent.Done():
	case <-time.After(settled):
		w.Fatalf("the agent still runs after %s", sig)
	}
	return w.agent.Wait(patient)
}

// get asks the agent's HTTP server; any status but 200 is an error. A dead agent
// ends the test.
func (w *world) get(path string) (string, error) {
	w.Helper()
	select {
	case <-w.agent.Done():
		w.Fatalf("the agent ended: %s", w.agent.Output())
	default:
	}
	resp, err := w.lab.HTTPClient(lab.Node).Get("http://" + httpAddr + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return string(body), fmt.Errorf("%s: %s: %s", path, resp.Status, body)
	}
	return string(body), nil
}

// until polls until done gives no error.
func (w *world) until(what string, done func() error) {
	w.Helper()
	w.untilWithin(patient, what, done)
}

// untilWithin is until for what takes its time.
func (w *world) untilWithin(patience time.Duration, what string, done func() error) {
	w.Helper()
	err := done()
	for end := time.Now().Add(patience); err != nil; err = done() {
		if time.Now().After(end) {
			w.Fatalf("waited in vain until %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// apply puts a manifest into the directory, and remove takes it out.
func (w *world) apply(file, text string) {
	w.Helper()
	w.must(lab.WriteFile(filepath.Join(w.dir, file), text))
}

func (w *world) remove(file string) {
	w.Helper()
	w.must(os.Remove(filepath.Join(w.dir, file)))
}

// example applies one of the policies that come with the program.
func (w *world) example(name string) {
	w.Helper()
	b, err := os.ReadFile(filepath.Join("../../deploy/examples", name+".yaml"))
	w.must(err)
	w.apply(name+".yaml", string(b))
}

// command runs a program in the node's namespace.
func (w *world) command(argv ...string) string {
	w.Helper()
	out, err := w.lab.Command(context.Background(), lab.Node, argv...)
	w.must(err)
	return out
}

// policy writes a NetworkPolicy from the YAML of its spec, in flow style.
func policy(key, spec string) string {
	namespace, name, _ := strings.Cut(key, "/")
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: %s, name: %s}\nspec: %s\n",
		namespace, name, spec)
}

// line is a decision log's line, or what of it tests look at.
type line struct {
	Kind                            string
	Verdict, Reason, Node, Protocol string
	Directions                      []string
	Src, Dst                        struct {
		IP, Namespace, Pod string
		Port               uint16
		Kind, Node         string
		Labels             map[string]string
	}
	Egress, Ingress  *side
	Cached, Observed bool
	LatencyNs        int64
	Time, LastTime   time.Time
	Generation       uint64
	Count            uint64
	Suppressed       uint64
	Lost             uint64
}

type side struct {
	Verdict   string
	Isolated  bool
	Policies  []string
	AllowedBy *struct {
		Policy  string
		Rule    int
		IPBlock string
	}
}

// decisions reads the decision log's whole lines so far, each of which must be as
// the schema has it.
func (w *world) decisions() (all []line) {
	w.Helper()
	b, err := os.ReadFile(w.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.Fatal(err)
	}
	return w.parse(string(b))
}

// parse reads whole lines of a decision log.
func (w *world) parse(text string) (all []line) {
	w.Helper()
	for text := range strings.Lines(text[:strings.LastIndexByte(text, '\n')+1]) {
		var d line
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			w.Fatalf("decision log: %v: %s", err, text)
		}
		w.validate(text)
		all = append(all, d)
	}
	return all
}

var schema = sync.OnceValues(func() (*jsonschema.Schema, error) {
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	return c.Compile("../../deploy/decision-log.schema.json")
})

// validate holds a line to the schema, once.
func (w *world) validate(text string) {
	w.Helper()
	if w.valid[text] {
		return
	}
	s, err := schema()
	w.must(err)
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	w.must(err)
	if err := s.Validate(v); err != nil {
		w.Errorf("decision log: %v: %s", err, text)
	}
	if w.valid == nil {
		w.valid = map[string]bool{}
	}
	w.valid[text] = true
}

// validateAll holds each record that the test left behind to the schema, looked at
// or not. What a sink couldn't write whole ends with a "~".
func (w *world) validateAll() {
	w.Helper()
	b, err := os.ReadFile(w.log)
	if err != nil {
		return // no log, or one on a disk that is gone
	}
	for text := range strings.Lines(string(b)) {
		if strings.HasSuffix(text, "}\n") {
			w.validate(text)
		}
	}
}

// logged waits until the log has n decisions that match, and gives them. More
// than n are an error.
func (w *world) logged(n int, match func(line) bool) []line {
	w.Helper()
	var found []line
	w.until(fmt.Sprintf("%d decisions are logged", n), func() error {
		found = nil
		for _, d := range w.decisions() {
			if match(d) {
				found = append(found, d)
			}
		}
		if len(found) < n {
			return fmt.Errorf("%d so far", len(found))
		}
		return nil
	})
	if len(found) > n {
		w.Errorf("%d decisions where %d were due: %+v", len(found), n, found)
	}
	return found
}
