package bench

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/policycache"
)

// town is a cluster that changes, with 1,000 of its pods in its first namespace.
type town struct {
	*policycache.Objects
	compiler *policycache.Compiler
	whole    bool // no word about what has changed
	step     int
}

// newTown's compiler is that of one node, or judges all pods.
func newTown(node string, pods, policies int) *town {
	t := &town{Objects: Cluster(pods, policies), compiler: policycache.NewCompiler(node, quiet())}
	for key, np := range t.Policies {
		np.ResourceVersion = "1-" + key // as an API server gives one
	}
	crowded := namespaceName(0)
	for i := range 1_000 {
		p := *clusterPod(i, pods/podsPerNamespace)
		delete(t.Pods, p.Key())
		p.Namespace = crowded
		t.Pods[p.Key()] = &p
	}
	t.compiler.Compile(t.Objects)
	return t
}

// pod gives the key of one of the pods, another one with each step.
func (t *town) pod() string {
	namespaces := len(t.Namespaces)
	return clusterPod(1_000+t.step*7919%(len(t.Pods)-1_000), namespaces).Key()
}

// compile compiles the town after a change.
func (t *town) compile(changed policycache.Changed) {
	t.step++
	if t.Changed = &changed; t.whole {
		t.Changed = nil
	}
	t.compiler.Compile(t.Objects)
}

// changes are what happens to a cluster, each together with its compile.
var changes = []struct {
	name   string
	change func(t *town)
}{
	{"pod-labels", func(t *town) {
		p := *t.Pods[t.pod()]
		p.Labels = map[string]string{"app": fmt.Sprint("app-", t.step%10), "pod": p.Name, "new": fmt.Sprint(t.step)}
		t.Pods[p.Key()] = &p
		t.compile(policycache.Changed{Pods: []string{p.Key()}})
	}},
	{"pod-goes-and-comes", func(t *town) {
		p := t.Pods[t.pod()]
		delete(t.Pods, p.Key())
		t.compile(policycache.Changed{Pods: []string{p.Key()}})
		again := *p
		again.UID += "x"
		t.Pods[p.Key()] = &again
		t.compile(policycache.Changed{Pods: []string{p.Key()}})
	}},
	{"policy", func(t *town) {
		key := fmt.Sprintf("%s/policy-%05d", namespaceName(t.step%1_000), t.step%1_000)
		np := t.Policies[key].DeepCopy()
		port := np.Spec.Ingress[0].Ports[0].Port
		port.IntVal++
		np.Spec.Ingress = append(np.Spec.Ingress[:1:1], networkingv1.NetworkPolicyIngressRule{From: clusterPeer(t.step, t.step)})
		np.ResourceVersion = fmt.Sprint(2_000_000 + t.step)
		t.Policies[key] = np
		t.compile(policycache.Changed{Policies: []string{key}})
	}},
	{"policy-of-1000-pods", func(t *town) {
		key := namespaceName(0) + "/policy-00000"
		np := t.Policies[key].DeepCopy()
		np.Spec.Ingress = append(np.Spec.Ingress[:1:1], networkingv1.NetworkPolicyIngressRule{From: clusterPeer(t.step, t.step)})
		np.ResourceVersion = fmt.Sprint(2_000_000 + t.step)
		t.Policies[key] = np
		t.compile(policycache.Changed{Policies: []string{key}})
	}},
	{"namespace-of-1000-pods", func(t *town) {
		n := *t.Namespaces[namespaceName(0)]
		n.Labels = map[string]string{"team": fmt.Sprint("team-", t.step%50), "stage": fmt.Sprint("stage-", t.step%3)}
		t.Namespaces[n.Name] = &n
		t.compile(policycache.Changed{Namespaces: []string{n.Name}})
	}},
	{"node", func(t *town) {
		name := fmt.Sprint("node-", t.step%100)
		t.Nodes[name] = &policycache.Node{Name: name, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{192, 168, byte(t.step), 1})}}
		t.compile(policycache.Changed{Nodes: []string{name}})
	}},
}

// BenchmarkCold measures a compile from nothing.
func BenchmarkCold(b *testing.B) {
	for _, policies := range []int{10, 1_000, 10_000} {
		o := Cluster(clusterPods, policies)
		b.Run(fmt.Sprintf("policies=%d", policies), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				policycache.NewCompiler("", quiet()).Compile(o)
			}
		})
	}
}

// BenchmarkChange measures what one change costs the compiler, with word from
// the source about what has changed, and for a pod's labels without. A pod that
// goes and comes is two changes. All pods are judged; what concerns a thousand of
// them is measured for a node's agent too, which judges a hundredth. The percentiles
// are of processor time.
func BenchmarkChange(b *testing.B) {
	for _, c := range changes {
		for _, whole := range []bool{false, true} {
			if whole && c.name != "pod-labels" {
				continue
			}
			b.Run(fmt.Sprintf("%s/whole=%v", c.name, whole), func(b *testing.B) {
				t := newTown("", clusterPods, 10_000)
				t.whole = whole
				measureChange(b, t, c.change)
			})
		}
		if strings.HasSuffix(c.name, "of-1000-pods") {
			b.Run(c.name+"/one-node", func(b *testing.B) { measureChange(b, newTown("node-0", clusterPods, 10_000), c.change) })
		}
	}
}

func measureChange(b *testing.B, t *town, change func(*town)) {
	took := make([]time.Duration, 0, 100_000)
	b.ReportAllocs()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for b.Loop() {
		start := threadTime()
		change(t)
		took = append(took, threadTime()-start)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "cpu-p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "cpu-p99-µs")
}

// threadTime is the processor time of this thread: other programs on the machine
// don't count.
func threadTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		panic(err)
	}
	return time.Duration(t.Nano())
}
