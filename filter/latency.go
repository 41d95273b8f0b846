package filter

import (
	"math"
	"sync/atomic"
	"time"
)

// latencyBounds are the upper bounds, inclusive, of the latency histogram's
// buckets; one more bucket takes what is slower.
var latencyBounds = [...]time.Duration{
	time.Microsecond, 2 * time.Microsecond, 5 * time.Microsecond,
	10 * time.Microsecond, 20 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 200 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond,
}

// LatencyBounds gives the upper bounds, inclusive, of the buckets of
// QueueStats.Latency.
func LatencyBounds() []time.Duration { return latencyBounds[:] }

// The exponential buckets are those of Prometheus' native histograms: with schema
// n, bucket i ends at 2^(i/2^n) seconds, inclusive.
const (
	// ExponentialSchema gives four buckets for each doubling.
	ExponentialSchema = 2
	// ExponentialFirst is the bucket that QueueStats.LatencyExponential begins with,
	// which takes what is faster too: 2^-20 seconds, about a microsecond. The last
	// one, which takes what is slower too, ends beyond 16 seconds.
	ExponentialFirst = -20 << ExponentialSchema
	exponentialLast  = 4<<ExponentialSchema + 1
)

// exponentialBounds are the ends of all exponential buckets but the last.
var exponentialBounds = func() (bounds [exponentialLast - ExponentialFirst]time.Duration) {
	for i := range bounds {
		bounds[i] = time.Duration(math.Exp2(float64(ExponentialFirst+i)/(1<<ExponentialSchema)) * float64(time.Second))
	}
	return bounds
}()

// latencies counts durations in both kinds of buckets.
type latencies struct {
	fixed       [len(latencyBounds) + 1]atomic.Uint64
	exponential [len(exponentialBounds) + 1]atomic.Uint64
	sum         atomic.Int64
}

func (l *latencies) add(d time.Duration) {
	l.fixed[bucketOf(latencyBounds[:], d)].Add(1)
	l.exponential[bucketOf(exponentialBounds[:], d)].Add(1)
	l.sum.Add(int64(d))
}

// bucketOf gives the first bound that isn't below d, or how many there are.
func bucketOf(bounds []time.Duration, d time.Duration) int {
	low, high := 0, len(bounds)
	for low < high {
		middle := int(uint(low+high) / 2)
		if bounds[middle] < d {
			low = middle + 1
		} else {
			high = middle
		}
	}
	return low
}
