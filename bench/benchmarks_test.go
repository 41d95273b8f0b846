package bench

import (
	"strings"
	"testing"
)

func TestBenchmarks(t *testing.T) {
	found, err := Benchmarks(strings.NewReader(`goos: linux
pkg: portcullis/bench
BenchmarkDecide/hit/IPv4/policies=10-2   	     100	        41.5 ns/op	       100.0 %hits	       0 B/op	       0 allocs/op
BenchmarkDecide/hit/IPv4/policies=10-2   	     100	        61.5 ns/op	       100.0 %hits	       0 B/op	       1 allocs/op
BenchmarkPut-16	 5	 7 ns/op
PASS
`))
	if err != nil {
		t.Fatal(err)
	}
	decide, put := found["Decide/hit/IPv4/policies=10"], found["Put"]
	if len(found) != 2 || decide["allocs/op"] != 1 || decide["%hits"] != 100 || decide["sec/op"] < 61e-9 || decide["sec/op"] > 62e-9 || put["sec/op"] == 0 {
		t.Errorf("%v", found)
	}
}
