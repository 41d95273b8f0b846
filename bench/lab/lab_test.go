package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// patient is for answers that must come: it ends only what hangs.
const patient = 30 * time.Second

func ips(s ...string) (all []netip.Addr) {
	for _, a := range s {
		all = append(all, netip.MustParseAddr(a))
	}
	return all
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newLab makes two routed and two bridged pods and a host.
func newLab(t *testing.T, name string) *Lab {
	t.Helper()
	l, err := New(name)
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	all := []Port{{TCP, 80, "web"}, {UDP, 53, "dns"}, {SCTP, 132, "sig"}}
	for _, p := range []PodSpec{
		{Namespace: "a", Name: "r1", IPs: ips("10.1.0.1", "fd00:1::1"), Ports: all},
		{Namespace: "a", Name: "r2", IPs: ips("10.1.0.2", "fd00:1::2"), Ports: all, Labels: map[string]string{"role": "db"}},
		{Namespace: "b", Name: "b1", IPs: ips("10.22.0.11", "fd00:22::11"), Ports: all, Mode: Bridged},
		{Namespace: "b", Name: "b2", IPs: ips("10.22.0.12", "fd00:22::12"), Ports: all, Mode: Bridged},
	} {
		must(t, l.AddPod(p))
	}
	must(t, l.AddHost("outside", ips("172.17.0.5", "fd00:17::5")...))
	must(t, l.Serve("outside", all...))
	return l
}

func TestEverybodyReachesEverybody(t *testing.T) {
	t.Parallel()
	l := newLab(t, "reach")
	var probes []Probe
	for _, from := range append(l.Names(), Node) {
		for _, to := range l.Names() {
			for _, ip := range l.IPs(to) {
				for _, p := range []Port{{TCP, 80, ""}, {UDP, 53, ""}, {SCTP, 132, ""}, {ICMP, 0, ""}} {
					probes = append(probes, Probe{From: from, To: ip, Proto: p.Proto, Port: p.Port, Timeout: patient})
				}
			}
		}
	}
	for i, r := range l.TryAll(probes) {
		if r.Outcome != Connected {
			t.Errorf("%+v: %s: %v", probes[i], r.Outcome, r.Err)
		}
	}
}

func TestOutcomes(t *testing.T) {
	t.Parallel()
	l := newLab(t, "outcomes")
	to := map[string]netip.Addr{"4": l.IP4("a/r2"), "6": l.IP6("a/r2"), "hole": netip.MustParseAddr("10.1.0.99")}
	// An address that leads into a pod which doesn't own it answers nothing.
	_, err := l.Command(context.Background(), Node, "ip", "route", "add", "blackhole", "10.1.0.99")
	must(t, err)
	_, err = l.Command(context.Background(), "a/r2", "ip", "route", "add", "blackhole", "10.1.0.1")
	must(t, err)
	for _, c := range []struct {
		from, to string
		proto    Proto
		port     uint16
		want     Outcome
	}{
		{"outside", "4", TCP, 81, Refused},
		{"outside", "6", TCP, 81, Refused},
		{"outside", "4", UDP, 81, Refused},
		{"outside", "6", UDP, 81, Refused},
		{"outside", "4", SCTP, 81, Refused},
		{"outside", "6", SCTP, 81, Refused},
		{"a/r1", "4", TCP, 80, TimedOut}, // no way back
		{"a/r1", "4", UDP, 53, TimedOut},
		{"a/r1", "4", SCTP, 132, TimedOut},
		{"a/r1", "4", ICMP, 0, TimedOut},
		{"outside", "4", "GRE", 0, Failed},
		{"nobody", "4", TCP, 80, Failed},
	} {
		wait := patient
		if c.want == TimedOut {
			wait = Timeout
		}
		r := l.Try(Probe{From: c.from, To: to[c.to], Proto: c.proto, Port: c.port, Timeout: wait})
		if r.Outcome != c.want {
			t.Errorf("%v: got %s, %v", c, r.Outcome, r.Err)
		}
		if (r.Err == nil) != (r.Outcome == Connected) {
			t.Errorf("%v: outcome %s with error %v", c, r.Outcome, r.Err)
		}
	}
}

// TestTheNodeIsTheOnlyWay shows that everything but bridge ports' traffic is
// forwarded by the node, where rules can see it, and that nothing leaves the
// lab.
func TestTheNodeIsTheOnlyWay(t *testing.T) {
	t.Parallel()
	l := newLab(t, "way")
	ctx := context.Background()
	out, err := l.Command(ctx, Node, "ip", "route", "show", "default")
	must(t, err)
	if out != "" {
		t.Errorf("the node has a way out: %s", out)
	}
	_, err = l.Command(ctx, Node, "iptables", "-w", "-A", "FORWARD", "-j", "DROP")
	must(t, err)
	_, err = l.Command(ctx, Node, "ip6tables", "-w", "-A", "FORWARD", "-j", "DROP")
	must(t, err)
	for _, pair := range [][2]string{{"a/r1", "a/r2"}, {"outside", "a/r1"}, {"b/b1", "a/r1"}, {"b/b1", "b/b2"}} {
		for _, ip := range l.IPs(pair[1]) {
			if r := l.Try(Probe{From: pair[0], To: ip, Proto: TCP, Port: 80}); r.Outcome != TimedOut {
				t.Errorf("%s to %s past the node: %s", pair[0], ip, r.Outcome)
			}
		}
	}
}

func TestHeldConnection(t *testing.T) {
	t.Parallel()
	l := newLab(t, "held")
	for _, proto := range []Proto{TCP, UDP} {
		port := map[Proto]uint16{TCP: 80, UDP: 53}[proto]
		c, err := l.Open("a/r1", proto, netip.AddrPortFrom(l.IP6("b/b1"), port), patient)
		must(t, err)
		for i := range 3 {
			must(t, c.Exchange(fmt.Sprint("word ", i), patient))
		}
		must(t, c.Close())
	}
}

func TestCounter(t *testing.T) {
	t.Parallel()
	l := newLab(t, "counter")
	n, err := l.CountUDP("a/r2", 5000)
	must(t, err)
	c, err := l.Open("a/r1", UDP, netip.AddrPortFrom(l.IP4("a/r2"), 5000), patient)
	must(t, err)
	defer c.Close()
	for range 5 {
		_, err := c.Write([]byte("x"))
		must(t, err)
	}
	waitFor(t, func() bool { return n.Count() == 5 })
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patient); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}

func TestMatrix(t *testing.T) {
	t.Parallel()
	l := newLab(t, "matrix")
	table, err := l.Matrix([]string{"a/r1", "b/b1", "outside"}, TCP, 80, patient)
	must(t, err)
	want := "TCP 80 a/r1 b/b1 outside\na/r1 . . .\nb/b1 . . .\noutside . . .\n"
	got := table.String()
	for strings.Contains(got, "  ") {
		got = strings.ReplaceAll(got, "  ", " ")
	}
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if _, err := l.Matrix([]string{"a/r1", "nobody"}, TCP, 80, Timeout); err == nil {
		t.Error("a matrix with somebody who isn't there")
	}
}

func TestProcess(t *testing.T) {
	t.Parallel()
	l := newLab(t, "process")
	p, err := l.Run(context.Background(), "a/r1", "sh", "-c", "ip -br addr; exec sleep 60")
	must(t, err)
	waitFor(t, func() bool { return strings.Contains(p.Output(), "10.1.0.1/32") })
	must(t, l.Close())
	if err := p.Wait(patient); err == nil {
		t.Error("the process outlived its lab")
	}
	if _, err := l.Run(context.Background(), "a/r1", "true"); err == nil {
		t.Error("a program ran in a closed lab")
	}
}

func TestRunMissingProgram(t *testing.T) {
	t.Parallel()
	l := newLab(t, "missing")
	if _, err := l.Run(context.Background(), Node, "/no/such/program"); err == nil {
		t.Error("no error for a program that isn't there")
	}
}

// TestRemoveAndReuse shows that a removed pod's address may come back in
// another one.
func TestRemoveAndReuse(t *testing.T) {
	t.Parallel()
	l := newLab(t, "reuse")
	must(t, l.Remove("a/r2"))
	must(t, l.AddPod(PodSpec{Namespace: "c", Name: "new", IPs: ips("10.1.0.2"), Ports: []Port{{TCP, 8080, ""}}}))
	r := l.Try(Probe{From: "a/r1", To: l.IP4("c/new"), Proto: TCP, Port: 8080, Timeout: patient})
	if r.Outcome != Connected {
		t.Errorf("%s: %v", r.Outcome, r.Err)
	}
	if err := l.Remove("a/r2"); err == nil {
		t.Error("removed twice")
	}
}

func TestBadPods(t *testing.T) {
	t.Parallel()
	l := newLab(t, "bad")
	for _, p := range []PodSpec{
		{Namespace: "a", Name: "r1", IPs: ips("10.1.0.77")},
		{Namespace: "a", Name: "noip"},
		{Namespace: "a", IPs: ips("10.1.0.78")},
		{Namespace: "a", Name: "off", IPs: ips("10.1.0.79"), Mode: Bridged},
		{Namespace: "a", Name: "icmp", IPs: ips("10.1.0.80"), Ports: []Port{{ICMP, 1, ""}}},
	} {
		if err := l.AddPod(p); err == nil {
			t.Errorf("%+v: no error", p)
		}
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	t.Parallel()
	l := newLab(t, "close")
	if names := namespacesOf(t, l.prefix); len(names) != 6 {
		t.Fatalf("want 6 namespaces, got %v", names)
	}
	must(t, l.Close())
	must(t, l.Close())
	if names := namespacesOf(t, l.prefix); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

func namespacesOf(t *testing.T, prefix string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(netnsDir, prefix+"*"))
	must(t, err)
	return names
}

// TestSweep leaves namespaces behind in the name of a process that is gone.
func TestSweep(t *testing.T) {
	t.Parallel()
	dead := exec.Command("true")
	must(t, dead.Run())
	prefix := fmt.Sprintf("%s%d-", namePrefix, dead.Process.Pid)
	must(t, alone(func() error { // the labs of other tests sweep too
		s, err := newSpace(prefix + "x-node")
		if err != nil {
			return err
		}
		s.nl.Close()
		return errors.Join(s.ns.Close(), os.WriteFile(filepath.Join(netnsDir, prefix+"x-half"), nil, 0o444))
	}))
	l, err := New("sweep")
	must(t, err)
	defer l.Close()
	if names := namespacesOf(t, prefix); len(names) != 0 {
		t.Errorf("not swept: %v", names)
	}
	if names := namespacesOf(t, l.prefix); len(names) != 1 {
		t.Errorf("swept too much: %v", names)
	}
}

func TestManifests(t *testing.T) {
	t.Parallel()
	l := newLab(t, "manifests")
	l.AddNamespace("a", map[string]string{"project": "myproject"})
	dir := t.TempDir()
	must(t, l.Manifests(dir))
	docs := func(file string) []string {
		b, err := os.ReadFile(filepath.Join(dir, file))
		must(t, err)
		return strings.Split(string(b), "---\n")[1:]
	}
	pods := docs("lab-pods.yaml")
	if len(pods) != 4 || len(docs("lab-nodes.yaml")) != 1 || len(docs("lab-namespaces.yaml")) != 2 {
		t.Fatalf("wrong number of objects: %d pods", len(pods))
	}
	var pod corev1.Pod
	must(t, yaml.UnmarshalStrict([]byte(pods[1]), &pod))
	got := fmt.Sprint(pod.Namespace, pod.Name, pod.Labels, pod.Spec.NodeName, pod.Status.Phase, pod.Status.PodIPs,
		pod.Spec.Containers[0].Ports[2].Name, pod.Spec.Containers[0].Ports[2].Protocol, pod.CreationTimestamp.Year())
	if want := "ar2map[role:db]node-1Running[{10.1.0.2} {fd00:1::2}]sigSCTP2026"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	var ns corev1.Namespace
	must(t, yaml.UnmarshalStrict([]byte(docs("lab-namespaces.yaml")[0]), &ns))
	if ns.Name != "a" || ns.Labels["project"] != "myproject" {
		t.Errorf("namespace %+v", ns.ObjectMeta)
	}
}

func FuzzParseSCTP(f *testing.F) {
	for _, chunk := range []byte{sctpInit, sctpInitAck, sctpAbort} {
		f.Add(sctpPacket{src: 1, dst: 2, vtag: 3, chunk: chunk, initTag: 4}.marshal())
	}
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := parseSCTP(b)
		if !ok {
			return
		}
		if again, ok := parseSCTP(p.marshal()); (p.chunk <= sctpInitAck || p.chunk == sctpAbort) && (!ok || again.src != p.src || again.chunk != p.chunk) {
			t.Errorf("%+v became %+v", p, again)
		}
	})
}
