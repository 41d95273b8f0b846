//go:build allocs

package bench

import (
	"bytes"
	"math"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// slack is the share by which a benchmark's allocations may exceed the baseline's.
// Maps grow by chance, so what allocates much never allocates quite the same; what
// allocates nothing, or little, must stay so exactly.
const slack = 0.05

// TestAllocs runs all microbenchmarks a few times, as BENCHMARKS names their
// packages, and fails if one allocates more per operation than it did when
// allocs.txt was recorded, by as many operations: what a change costs differs from
// one to the next. How long they take doesn't matter here. A benchmark
// that the baseline doesn't know is told, since then nobody watches it.
func TestAllocs(t *testing.T) {
	file, err := os.Open("allocs.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	before, err := Benchmarks(file)
	if err != nil {
		t.Fatal(err)
	}
	packages := strings.Fields(os.Getenv("BENCHMARKS"))
	if len(packages) == 0 {
		t.Fatal("BENCHMARKS names no packages: run this by make bench-allocs")
	}
	cmd := exec.Command("go", append([]string{"test", "-run", "^$", "-bench", ".", "-benchmem", "-benchtime", "10x"}, packages...)...)
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	now, err := Benchmarks(bytes.NewReader(out))
	if err != nil || len(now) == 0 {
		t.Fatalf("no benchmarks: %v\n%s", err, out)
	}
	for name, values := range now {
		was, known := before[name]
		switch got, most := values["allocs/op"], math.Floor(was["allocs/op"]*(1+slack)); {
		case !known:
			t.Logf("%s isn't in the baseline: record it anew with make bench-baseline", name)
		case got > most:
			t.Errorf("%s: %g allocs/op, %g in the baseline", name, got, was["allocs/op"])
		}
	}
}
