package proof

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// pathBenchmarks are the microbenchmarks of what the agent does with a packet.
const pathBenchmarks = "^(BenchmarkParsePacket|BenchmarkDecode|BenchmarkWorker|BenchmarkPut)$"

// microbenchmarks runs those of the packet's path and gives their lines by name.
func microbenchmarks(ctx context.Context, source, benchtime string) (map[string]string, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "./filter", "./filter/audit", "-run", "^$", "-bench", pathBenchmarks, "-benchtime", benchtime, "-benchmem")
	cmd.Dir = source
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("microbenchmarks: %w: %s", err, out)
	}
	return parseBench(out), nil
}

// parseBench gives what `go test -bench` prints after each benchmark's name.
func parseBench(out []byte) map[string]string {
	lines := map[string]string{}
	for scan := bufio.NewScanner(bytes.NewReader(out)); scan.Scan(); {
		name, rest, ok := strings.Cut(scan.Text(), "\t")
		if name = strings.TrimSpace(name); ok && strings.HasPrefix(name, "Benchmark") {
			lines[strings.TrimPrefix(name, "Benchmark")] = strings.Join(strings.Fields(rest), " ")
		}
	}
	return lines
}
