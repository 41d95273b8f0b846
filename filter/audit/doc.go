// Package audit is the decision log: it carries every decision from the packet
// path to its sinks without ever holding up a verdict.
//
//	worker ─ Ring ─┐                                            ┌─ sink's queue ─ file
//	worker ─ Ring ─┼─ selection ─ repeats ─ rate limit ─ line ──┤
//	worker ─ Ring ─┘        (the log's one goroutine)           └─ sink's queue ─ standard output
//
// Each worker puts fixed-size records into a ring of its own; one goroutine
// empties all rings every few milliseconds, and one goroutine per sink writes
// what it is given. Both the rings and the sinks' queues are bounded: what finds
// one full is lost and counted, and nobody waits. For each sink, once all is
// written out,
//
//	written + unselected + sampled out + suppressed + lost = decisions
//
// holds exactly, where a line about n repeats counts n. What was suppressed or
// lost is told in the log itself too, by lines of the kind "missing".
//
// The lines are described, field by field, by deploy/decision-log.schema.json.
// Those of one worker are in the order of its decisions, but for denials, which
// come when their window ends; those of different workers may be some
// milliseconds out of order.
package audit
