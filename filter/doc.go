// Package filter is the part of Portcullis that touches the kernel: the rules
// and sets that send the first packet of a connection of an isolated local pod
// to NFQUEUE, and the workers that read the packet there, have the verdict
// engine judge it, and write the verdict back.
//
// A packet's path through this package:
//
//	NFQUEUE -> worker's read -> parsePacket -> Decoder -> verdict.Worker
//	        <- verdict message (the accepted bit in NFQA_MARK) <-
//	                                  then: audit.Ring -> audit.Log
//
// The gate stays shut on every mistake: whatever can't be parsed, decoded or
// decided is dropped. The package imports verdict and knows no Kubernetes.
package filter
