package bench

import (
	"io"
	"strings"

	"golang.org/x/perf/benchfmt"
)

// Benchmarks reads what `go test -bench` prints and gives each benchmark's values
// by their units, such as "sec/op" and "allocs/op": the highest of its runs. Names
// come without the number of processors.
func Benchmarks(r io.Reader) (map[string]map[string]float64, error) {
	found := map[string]map[string]float64{}
	lines := benchfmt.NewReader(r, "benchmarks")
	for lines.Scan() {
		line, ok := lines.Result().(*benchfmt.Result)
		if !ok {
			continue // a setting, or a line that is none of a benchmark
		}
		name := benchmarkName(line.Name)
		if found[name] == nil {
			found[name] = map[string]float64{}
		}
		for _, v := range line.Values {
			found[name][v.Unit] = max(found[name][v.Unit], v.Value)
		}
	}
	return found, lines.Err()
}

// benchmarkName leaves out the part that says on how many processors it ran.
func benchmarkName(n benchfmt.Name) string {
	base, parts := n.Parts()
	var name strings.Builder
	name.Write(base)
	for _, p := range parts {
		if p[0] != '-' {
			name.Write(p)
		}
	}
	return name.String()
}
