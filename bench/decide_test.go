package bench

import (
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"

	"portcullis/policycache"
	"portcullis/verdict"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// clusterPods is the size of the cluster that decisions are measured on.
const clusterPods = 10_000

// isolatedPods lists the pods that some policy isolates.
func isolatedPods(s *verdict.Snapshot) (isolated []int) {
	for i := range clusterPods {
		if s.Endpoint(PodIPv4(i)).Isolated() {
			isolated = append(isolated, i)
		}
	}
	return isolated
}

// find searches the cluster for flows of the wanted verdict from any pod, or with
// both from an isolated one, to an isolated pod, so that what is measured is what
// its name says.
func find(b *testing.B, s *verdict.Snapshot, want verdict.Verdict, ip func(int) netip.Addr, both bool, n int) []verdict.Flow {
	b.Helper()
	isolated := isolatedPods(s)
	var flows []verdict.Flow
	seen := map[verdict.Flow]bool{}
	r := rand.New(rand.NewPCG(1, 1))
	for tries := 0; tries < 1_000_000 && len(flows) < n; tries++ {
		f := verdict.Flow{
			Src: ip(r.IntN(clusterPods)), Dst: ip(isolated[r.IntN(len(isolated))]),
			Proto: verdict.TCP, SrcPort: 40000, DstPort: uint16(5432 + r.IntN(4)),
		}
		if both {
			f.Src = ip(isolated[r.IntN(len(isolated))])
		}
		d := s.Decide(&f)
		if !seen[f] && d.Verdict == want && (want == verdict.Deny || d.Reason == verdict.ReasonRule) {
			seen[f] = true
			flows = append(flows, f)
		}
	}
	if len(flows) < min(n, 300) {
		b.Fatalf("only %d flows of the cluster are decided %s", len(flows), want)
	}
	return flows
}

// BenchmarkDecide measures the decision alone: from a decoded packet to a
// verdict with its reason, between pods chosen at random. A miss includes taking
// over a slot of the cache. In deny-both both ends are isolated, whatever the
// number of policies.
func BenchmarkDecide(b *testing.B) {
	for _, policies := range []int{10, 1_000, 10_000} {
		compiler := policycache.NewCompiler("", quiet())
		s := compiler.Compile(Cluster(clusterPods, policies))
		engine := verdict.NewEngine()
		engine.Swap(s)
		families := []struct {
			name string
			ip   func(int) netip.Addr
		}{{"IPv4", PodIPv4}, {"IPv6", PodIPv6}}
		for _, family := range families {
			allowed := find(b, s, verdict.Allow, family.ip, false, 4096)
			denied := find(b, s, verdict.Deny, family.ip, false, 4096)
			both := find(b, s, verdict.Deny, family.ip, true, 4096)
			run := func(name string, cache int, flows []verdict.Flow) {
				b.Run(fmt.Sprintf("%s/%s/policies=%d", name, family.name, policies), func(b *testing.B) {
					measure(b, engine.NewWorker(cache), flows)
				})
			}
			run("hit", 8192, allowed[:64])
			run("miss", 256, allowed)
			run("uncached", 0, allowed)
			run("deny-hit", 8192, denied[:64])
			run("deny-miss", 256, denied)
			run("deny-both", 0, both)
		}
	}
}

func measure(b *testing.B, w *verdict.Worker, flows []verdict.Flow) {
	hits := 0
	for i := range flows {
		w.Decide(&flows[i])
	}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		if w.Decide(&flows[i%len(flows)]).Cached {
			hits++
		}
	}
	b.StopTimer()
	b.ReportMetric(100*float64(hits)/float64(b.N), "%hits")
}

// BenchmarkTraffic measures whether the flow cache pays, with it and without, at
// 10,000 policies: for a few flows again and again, for as many as the cache
// holds nearly all of, for many more, and for one client that tries all ports of
// a pod, alone and between the few flows.
func BenchmarkTraffic(b *testing.B) {
	s := policycache.NewCompiler("", quiet()).Compile(Cluster(clusterPods, 10_000))
	engine := verdict.NewEngine()
	engine.Swap(s)
	flows := find(b, s, verdict.Deny, PodIPv4, false, 100_000)
	var scan, mixed []verdict.Flow
	for port := range 60_000 {
		f := flows[0]
		f.DstPort = uint16(port)
		scan = append(scan, f)
		mixed = append(mixed, f, flows[port%64])
	}
	for _, traffic := range []struct {
		name  string
		flows []verdict.Flow
	}{{"few", flows[:64]}, {"fitting", flows[:4096]}, {"many", flows}, {"port-scan", scan}, {"port-scan-and-few", mixed}} {
		for _, cache := range []int{0, 8192} {
			b.Run(fmt.Sprintf("%s/cache=%d", traffic.name, cache), func(b *testing.B) {
				measure(b, engine.NewWorker(cache), traffic.flows)
			})
		}
	}
}

// BenchmarkManyPoliciesOnOnePod measures a miss against a pod that hundreds of
// policies select at once.
func BenchmarkManyPoliciesOnOnePod(b *testing.B) {
	for _, policies := range []int{10, 100, 1_000} {
		o := Cluster(podsPerNamespace, policies) // one namespace
		s := policycache.NewCompiler("", quiet()).Compile(o)
		engine := verdict.NewEngine()
		engine.Swap(s)
		b.Run(fmt.Sprintf("policies=%d", policies), func(b *testing.B) {
			w := engine.NewWorker(0)
			f := verdict.Flow{Src: netip.MustParseAddr("203.0.113.9"), Dst: PodIPv4(1), Proto: verdict.TCP, DstPort: 9}
			if got := w.Decide(&f); got.Verdict != verdict.Deny || len(got.Ingress.Policies()) < policies/2 {
				b.Fatalf("%s by %d policies", got.Verdict, len(got.Ingress.Policies()))
			}
			b.ReportAllocs()
			for b.Loop() {
				w.Decide(&f)
			}
		})
	}
}

// TestDecisionsDontAllocate holds on a large cluster what the benchmarks
// report: no decision allocates, hit or miss.
func TestDecisionsDontAllocate(t *testing.T) {
	s := policycache.NewCompiler("", quiet()).Compile(Cluster(2_000, 2_000))
	engine := verdict.NewEngine()
	engine.Swap(s)
	w, i := engine.NewWorker(256), 0
	allocs := testing.AllocsPerRun(20_000, func() {
		i++
		f := verdict.Flow{Src: PodIPv4(i * 7919 % 2000), Dst: PodIPv6(i % 2000), Proto: verdict.TCP, DstPort: uint16(i)}
		if i%2 == 0 {
			f.Dst = PodIPv4(i * 31 % 2000)
		}
		w.Decide(&f)
	})
	if allocs != 0 {
		t.Errorf("%v allocations per decision", allocs)
	}
}

// TestMemoryGrowsNoFasterThanTheCluster compiles a cluster and ones with ten
// times the pods, the policies, or both: they must not multiply. It says what a
// pod and a policy cost, when all pods are judged and have addresses of both
// families.
func TestMemoryGrowsNoFasterThanTheCluster(t *testing.T) {
	small, large := compiledBytes(1_000, 1_000), compiledBytes(10_000, 10_000)
	pods, policies := compiledBytes(10_000, 1_000), compiledBytes(1_000, 10_000)
	t.Logf("1,000 pods and policies: %d KiB; 10,000: %d KiB", small>>10, large>>10)
	t.Logf("a pod more: %d bytes; a policy more: %d bytes", (pods-small)/9_000, (large-pods)/9_000)
	const constant = 256 << 10
	for what, bytes := range map[string]uint64{"cluster": large, "number of pods": pods, "number of policies": policies} {
		if bytes > 10*small+constant {
			t.Errorf("ten times the %s takes %.1f times the memory", what, float64(bytes)/float64(small))
		}
	}
}

func compiledBytes(pods, policies int) uint64 {
	o := Cluster(pods, policies)
	before := heap()
	c := policycache.NewCompiler("", quiet())
	s := c.Compile(o)
	after := heap()
	runtime.KeepAlive(c)
	runtime.KeepAlive(s)
	runtime.KeepAlive(o)
	return after - before
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
