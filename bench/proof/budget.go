package proof

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"

	"portcullis/bench"
)

// pathBenchmarks are the microbenchmarks of what the agent does with a packet.
const pathBenchmarks = "^(BenchmarkParsePacket|BenchmarkDecode|BenchmarkWorker|BenchmarkPut)$"

// microbenchmarks runs those of the packet's path, in the repository at source, and
// gives their times per operation in nanoseconds.
func microbenchmarks(ctx context.Context, source, benchtime string) (map[string]float64, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "./filter", "./filter/audit", "-run", "^$", "-bench", pathBenchmarks, "-benchtime", benchtime)
	cmd.Dir = source
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("microbenchmarks: %w: %s", err, out)
	}
	found, err := bench.Benchmarks(bytes.NewReader(out))
	if err != nil {
		return nil, fmt.Errorf("microbenchmarks: %w", err)
	}
	times := map[string]float64{}
	for name, values := range found {
		times[name] = values["sec/op"] * 1e9
	}
	return times, nil
}
