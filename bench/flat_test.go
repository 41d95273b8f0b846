package bench

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"portcullis/policycache"
	"portcullis/verdict"
)

// flatFlows is how many flows a round of BenchmarkFlat asks about. With a cache of
// flatCache entries nearly all of them miss.
const flatFlows, flatCache = 4096, 256

// BenchmarkFlat measures how much dearer a decision is with 10,000 policies than
// with 10, by rounds that take turns, so that both see the same of what else the
// machine does. An operation is a round of both, of as many flows each. Whatever
// their number, the policies isolate both ends of each flow, so that as many tables
// are asked; flows are drawn without regard to their verdict.
//
//   - same: the same flows, between the 100 pods that the 10 policies isolate too.
//     What is compared is the policies alone: of 10,000, these pods have ten each.
//   - random: at 10,000 policies between any pods. What is compared is also how
//     much memory 10,000 pods' tables and addresses are beside those of 100, and
//     how little of it the processor's own caches hold.
//
// The metrics are ns per decision, the smallest and the median of all rounds.
func BenchmarkFlat(b *testing.B) {
	few, many := flatCluster(10), flatCluster(10_000)
	for _, family := range []struct {
		name string
		ip   func(int) netip.Addr
	}{{"IPv4", PodIPv4}, {"IPv6", PodIPv6}} {
		same := flowsBetween(isolatedPods(few.Snapshot()), family.ip)
		random := flowsBetween(isolatedPods(many.Snapshot()), family.ip)
		for _, way := range []struct {
			name  string
			cache int
		}{{"miss", flatCache}, {"uncached", 0}} {
			b.Run(way.name+"/same/"+family.name, func(b *testing.B) { compareFlat(b, few, many, way.cache, same, same) })
			b.Run(way.name+"/random/"+family.name, func(b *testing.B) { compareFlat(b, few, many, way.cache, same, random) })
		}
	}
}

func flatCluster(policies int) *verdict.Engine {
	e := verdict.NewEngine()
	e.Swap(policycache.NewCompiler("", quiet()).Compile(Cluster(clusterPods, policies)))
	return e
}

// flowsBetween draws distinct flows between some pods.
func flowsBetween(pods []int, ip func(int) netip.Addr) []verdict.Flow {
	r := rand.New(rand.NewPCG(1, 1))
	flows, seen := make([]verdict.Flow, 0, flatFlows), map[verdict.Flow]bool{}
	for len(flows) < flatFlows {
		f := verdict.Flow{
			Src: ip(pods[r.IntN(len(pods))]), Dst: ip(pods[r.IntN(len(pods))]),
			Proto: verdict.TCP, SrcPort: 40000, DstPort: uint16(5432 + r.IntN(4)),
		}
		if !seen[f] && f.Src != f.Dst {
			seen[f] = true
			flows = append(flows, f)
		}
	}
	return flows
}

func compareFlat(b *testing.B, few, many *verdict.Engine, cache int, fewFlows, manyFlows []verdict.Flow) {
	workers := [2]*verdict.Worker{few.NewWorker(cache), many.NewWorker(cache)}
	flows := [2][]verdict.Flow{fewFlows, manyFlows}
	took := [2][]float64{make([]float64, 0, 100_000), make([]float64, 0, 100_000)}
	hits := 0
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		for i, w := range workers {
			start := time.Now()
			for j := range flows[i] {
				if d := w.Decide(&flows[i][j]); d.Cached || !d.Egress.Isolated || !d.Ingress.Isolated {
					hits++
				}
			}
			took[i] = append(took[i], float64(time.Since(start))/flatFlows)
		}
	}
	b.StopTimer()
	if most := b.N * 2 * flatFlows / 10; hits > most {
		b.Fatalf("%d of the decisions aren't what is measured, want at most %d", hits, most)
	}
	for i, size := range [2]string{"few", "many"} {
		slices.Sort(took[i])
		b.ReportMetric(took[i][0], size+"-min-ns")
		b.ReportMetric(took[i][len(took[i])/2], size+"-median-ns")
	}
	b.ReportMetric(took[1][0]/took[0][0], "min-ratio")
	b.ReportMetric(took[1][len(took[1])/2]/took[0][len(took[0])/2], "median-ratio")
}
