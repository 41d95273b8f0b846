//go:build apiserver

package proof

import (
	"testing"
	"time"
)

// generous is far above what a change may take (reactionTarget), and far below what it
// takes when something waits for a timer.
const generous = time.Second

// TestAPIServerChanges has a real API server tell an agent of changes, 50 a second in a
// cluster of 10,000 pods and as many policies, until real packets' fate tells that the
// kernel enforces each. It holds the agent's memory too, which has its bound whatever
// else the machine does.
func TestAPIServerChanges(t *testing.T) {
	p, err := ParamsFromEnv()
	if err != nil {
		t.Fatal(err)
	}
	p.Variants, p.Policies, p.Reactions = apiName, []int{10_000}, 200
	results, err := Run(t.Context(), p, programs(t), say)
	if err != nil {
		t.Fatal(err)
	}
	if len(results.reactions) != 1 {
		t.Fatalf("%d series were measured", len(results.reactions))
	}
	r := results.reactions[0]
	if r.Failed > 0 || len(r.LatencyNs) != p.Reactions {
		t.Errorf("%d changes of %d were never enforced", r.Failed, p.Reactions)
	}
	if most := percentile(micros(r.LatencyNs), 0.95); most > float64(generous.Microseconds()) {
		t.Errorf("one change of 20 took %.0f µs or more", most)
	}
	if r.memory.peak > residentTarget {
		t.Errorf("the agent had %.0f MiB resident, of at most %d", r.memory.peak, residentTarget)
	}
}
