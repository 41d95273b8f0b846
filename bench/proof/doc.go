// Package proof measures Portcullis beside everything that it could be compared
// with: no filter, conntrack rules alone, a bare NFQUEUE echo, the same echo by
// go-nfqueue's callback, and kube-router's way with iptables. It sends real
// packets through network namespaces of its own (bench/lab), each variant's own,
// and never through the machine's.
//
// A round measures every variant once; the order changes from round to round, and
// ratios are made within a round, so that what disturbs the machine for a while
// disturbs nobody's ratio much. While one variant is measured the processes of
// the others are stopped.
//
// What serves and what loads are processes too: the program that runs the proof,
// started again with a role (see RunRole). `make bench` runs it all and writes
// bench/RESULTS.md and bench/plots.
package proof
