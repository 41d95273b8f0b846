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

// find searches the cluster for flows of the wanted verdict with an isolated
// end, so that what is measured is what its name says.
func find(b *testing.B, s *verdict.Snapshot, want verdict.Verdict, ip func(int) netip.Addr, n int) []verdict.Flow {
	b.Helper()
	var isolated []netip.Addr
	for i := range clusterPods {
		if s.Endpoint(ip(i)).Isolated() {
			isolated = append(isolated, ip(i))
		}
	}
	var flows []verdict.Flow
	seen := map[verdict.Flow]bool{}
	r := rand.New(rand.NewPCG(1, 1))
	for tries := 0; tries < 1_000_000 && len(flows) < n; tries++ {
		f := verdict.Flow{
			Src: ip(r.IntN(clusterPods)), Dst: isolated[r.IntN(len(isolated))],
			Proto: verdict.TCP, SrcPort: 40000, DstPort: uint16(5432 + r.IntN(4)),
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
// verdict with its reason. A miss includes taking over a slot of the cache.
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
			allowed := find(b, s, verdict.Allow, family.ip, 4096)
			denied := find(b, s, verdict.Deny, family.ip, 4096)
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

// BenchmarkPortScan measures decisions while one client tries all ports of a
// pod: every one a miss.
func BenchmarkPortScan(b *testing.B) {
	s := policycache.NewCompiler("", quiet()).Compile(Cluster(clusterPods, 10_000))
	engine := verdict.NewEngine()
	engine.Swap(s)
	for _, cache := range []int{0, 8192} {
		b.Run(fmt.Sprintf("cache=%d", cache), func(b *testing.B) {
			w := engine.NewWorker(cache)
			f := find(b, s, verdict.Deny, PodIPv4, 1)[0]
			b.ReportAllocs()
			for b.Loop() {
				f.DstPort++
				w.Decide(&f)
			}
		})
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
			if got := w.Decide(&f); got.Verdict != verdict.Deny || len(got.Ingress.Policies) < policies/2 {
				b.Fatalf("%s by %d policies", got.Verdict, len(got.Ingress.Policies))
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

// TestMemoryGrowsNoFasterThanTheCluster compiles a cluster and one ten times
// its size: pods and policies must not multiply.
func TestMemoryGrowsNoFasterThanTheCluster(t *testing.T) {
	small, large := compiledBytes(1_000, 1_000), compiledBytes(10_000, 10_000)
	t.Logf("1,000 pods and policies: %d KiB; 10,000: %d KiB", small>>10, large>>10)
	if large > 15*small {
		t.Errorf("ten times the cluster takes %.1f times the memory", float64(large)/float64(small))
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
