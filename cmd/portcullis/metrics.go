package main

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"portcullis/filter"
	"portcullis/verdict"
)

// metrics are what /metrics shows. What the workers count is read from them
// when somebody scrapes; the packet path knows nothing of Prometheus.
type metrics struct {
	registry *prometheus.Registry
	compile  prometheus.Histogram
	repairs  prometheus.Counter
	forgot   prometheus.Counter
}

func newMetrics(a *agent) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		compile: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                            compileTime.name,
			Help:                            compileTime.help,
			Buckets:                         prometheus.ExponentialBuckets(0.0001, 4, 9),
			NativeHistogramBucketFactor:     1.2,
			NativeHistogramMaxBucketNumber:  100,
			NativeHistogramMinResetDuration: time.Hour,
		}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{Name: repairs.name, Help: repairs.help}),
	}
	m.forgot = prometheus.NewCounter(prometheus.CounterOpts{Name: forgotten.name, Help: forgotten.help})
	m.registry.MustRegister(m.compile, m.repairs, m.forgot, agentCollector{a},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) compiled(took time.Duration) { m.compile.Observe(took.Seconds()) }
func (m *metrics) repaired(n int)              { m.repairs.Add(float64(n)) }

// family is a metric of the agent's own. All of them are in README's table.
type family struct {
	name, kind, help string
	labels           []string
	desc             *prometheus.Desc
}

// families are all metrics of the agent's own, in the order of the table.
var families []family

func newFamily(kind, name, help string, labels []string) family {
	name = "portcullis_" + name
	f := family{name, kind, help, labels, prometheus.NewDesc(name, help, labels, nil)}
	families = append(families, f)
	return f
}

func counter(name, help string, labels ...string) family {
	return newFamily("counter", name, help, labels)
}

func gauge(name, help string, labels ...string) family {
	return newFamily("gauge", name, help, labels)
}

func histogram(name, help string) family { return newFamily("histogram", name, help, nil) }

// emit sends one value of a counter or gauge.
func (f family) emit(ch chan<- prometheus.Metric, value float64, labels ...string) {
	kind := prometheus.CounterValue
	if f.kind == "gauge" {
		kind = prometheus.GaugeValue
	}
	ch <- prometheus.MustNewConstMetric(f.desc, kind, value, labels...)
}

var (
	buildInfo = gauge("build_info", "Always 1; the label tells the version.", "version")
	ready     = gauge("ready", "1 when the agent is ready, else 0.")

	decisions  = counter("decisions_total", "Decisions by verdict and reason.", "verdict", "reason")
	directions = counter("directions_total", "Judged directions by how they fell, and the reason of the decision that they are of.", "direction", "verdict", "reason")
	cacheHits  = counter("cache_hits_total", "Decisions that came from the flow cache.")
	latency    = histogram("verdict_latency_seconds", "Time from reading a packet to its verdict.")

	packets      = counter("queue_packets_total", "Packets that the kernel queued and the agent read.", "queue")
	queueWaiting = gauge("queue_waiting_packets", "Packets that wait for a verdict.", "queue")
	queueDropped = counter("queue_dropped_total", "Packets that the kernel couldn't queue: the queue was full, or the socket's buffer (the kernel's queue_dropped and user_dropped).", "queue", "full")
	queueErrors  = counter("queue_errors_total", "What went wrong on a queue, each time on the closed side.", "queue", "kind")

	logWritten = counter("decision_log_records_total", "Decisions written to a sink of the decision log; a record about n repeats counts n.", "sink")
	logLost    = counter("decision_log_lost_total", "Decisions that a sink of the decision log lost: a ring or the sink's queue was full, or it refused.", "sink")
	logErrors  = counter("decision_log_errors_total", "Times that a sink of the decision log refused what was to be written.", "sink")
	logOmitted = counter("decision_log_omitted_total", "Decisions left out of the decision log on purpose: not selected, sampled out, or suppressed by the rate limit.", "why")
	logHeld    = gauge("decision_log_held_decisions", "Denials that wait for the end of their window.")

	compileTime   = histogram("compile_duration_seconds", "Time to compile a state into policy.")
	generation    = gauge("snapshot_generation", "Number of the policy snapshot in force.")
	statePods     = gauge("pods", "Pods in the state.")
	statePolicies = gauge("policies", "NetworkPolicies in the state.")
	invalid       = gauge("invalid_policies", "NetworkPolicies with mistakes: each isolates what it selects, and its rules with mistakes allow nothing.")
	problems      = gauge("invalid_objects", "What is wrong with objects while enforcement goes on: mistakes in policies and annotations, addresses that several pods claim.")
	isolatedPods  = gauge("isolated_pods", "Pods of this node that some policy isolates.")
	auditOnlyPods = gauge("audit_only_pods", "Those of the isolated pods that are in audit-only mode: what they would deny passes.")
	isolated      = gauge("isolated_addresses", "Addresses of this node's isolated pods.")
	judged        = gauge("judged_addresses", "Addresses of this node's pods.")
	setMembers    = gauge("set_members", "Addresses that each ipset of isolated pods is kept to.", "set")
	repairs       = counter("repairs_total", "Rules and sets that others had altered and that were put right.")

	lastChange  = gauge("state_last_change_timestamp_seconds", "When the state last changed.")
	stateAge    = gauge("state_age_seconds", "Time since the API server last said anything of a resource; bookmarks come every minute or so.", "resource")
	watchErrors = counter("watch_errors_total", "What went wrong with lists and watches of the API server.", "resource")
	watchBroken = gauge("watch_broken", "1 while a resource can't be watched, else 0; its last known state is in force.", "resource")
	filesWrong  = gauge("manifest_files_wrong", "Manifest files that are wrong now; the last good state of each, if there was one, is in force.")
	failedLoads = counter("manifest_failed_loads_total", "Times that a manifest file was read and found wrong.")
	iptablesRun = counter("iptables_commands_total", "iptables commands that the agent has run: to put rules in place and to read them. Changes of pods and policies run none.")
)

// agentCollector reads an agent's figures when somebody scrapes.
type agentCollector struct{ a *agent }

// Describe sends nothing, which makes the collector an unchecked one: which
// queues and reasons there are shows at each scrape.
func (agentCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c agentCollector) Collect(ch chan<- prometheus.Metric) {
	a := c.a
	buildInfo.emit(ch, 1, version)
	ready.emit(ch, boolGauge(len(a.unready()) == 0))
	iptablesRun.emit(ch, float64(filter.CommandsRun()))
	a.source.collect(ch)
	if s := a.engine.Snapshot(); s != nil {
		generation.emit(ch, float64(s.Generation()))
	}
	collectDecisionLog(ch, a.audit.Stats())
	for set, members := range a.kernel.SetMembers() {
		setMembers.emit(ch, float64(members), set)
	}
	collectRejudged(ch, a.revoker.Stats())
	a.spoof.collect(ch)
	a.mu.Lock()
	defer a.mu.Unlock()
	statePods.emit(ch, float64(a.state.pods))
	statePolicies.emit(ch, float64(a.state.policies))
	invalid.emit(ch, float64(a.state.invalid))
	isolatedPods.emit(ch, float64(a.state.isolatedPods))
	auditOnlyPods.emit(ch, float64(a.state.auditOnlyPods))
	isolated.emit(ch, float64(a.state.isolated))
	judged.emit(ch, float64(a.state.judged))
	problems.emit(ch, float64(len(a.state.problems)))
	a.collectEvents(ch)
	collectRecord(ch, a.recorder)
	if a.queues != nil {
		collectQueues(ch, a.queues.Stats())
	}
}

func boolGauge(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// collectQueues shows each queue's figures, and what the queues decided summed
// over them.
func collectQueues(ch chan<- prometheus.Metric, queues []filter.QueueStats) {
	var hits uint64
	var all, egress, ingress tally
	for _, q := range queues {
		collectQueue(ch, q)
		hits += q.CacheHits
		all.add(q.Decisions)
		egress.add(q.Egress)
		ingress.add(q.Ingress)
	}
	cacheHits.emit(ch, float64(hits))
	for _, v := range verdict.Verdicts() {
		for _, reason := range verdict.Reasons() {
			if n := all.of(reason, v); n > 0 || usual[v] == reason {
				decisions.emit(ch, float64(n), v.String(), reason.String())
			}
			if n := egress.of(reason, v); n > 0 || usual[v] == reason {
				directions.emit(ch, float64(n), "egress", v.String(), reason.String())
			}
			if n := ingress.of(reason, v); n > 0 || usual[v] == reason {
				directions.emit(ch, float64(n), "ingress", v.String(), reason.String())
			}
		}
	}
	collectLatency(ch, queues)
	collectHeld(ch, queues)
}

// usual is each verdict's usual reason, which is shown even at zero: a rate can be
// told of what was there before.
var usual = map[verdict.Verdict]verdict.Reason{
	verdict.Allow: verdict.ReasonRule, verdict.Deny: verdict.ReasonNoRule, verdict.WouldDeny: verdict.ReasonNoRule,
}

// tally sums counts by reason and verdict.
type tally [][verdict.VerdictCount]uint64

func (t *tally) add(counts [][verdict.VerdictCount]uint64) {
	if *t == nil {
		*t = slices.Clone(counts)
		return
	}
	for reason := range counts {
		for v := range counts[reason] {
			(*t)[reason][v] += counts[reason][v]
		}
	}
}

func (t tally) of(reason verdict.Reason, v verdict.Verdict) uint64 {
	if int(reason) >= len(t) {
		return 0
	}
	return t[reason][v]
}

func collectQueue(ch chan<- prometheus.Metric, q filter.QueueStats) {
	number := strconv.Itoa(int(q.Queue))
	packets.emit(ch, float64(q.Packets), number)
	queueWaiting.emit(ch, float64(q.Waiting), number)
	queueDropped.emit(ch, float64(q.KernelDropped), number, "queue")
	queueDropped.emit(ch, float64(q.UserDropped), number, "socket")
	queueErrors.emit(ch, float64(q.Unparsed), number, "unparsed")
	queueErrors.emit(ch, float64(q.Panics), number, "panic")
	queueErrors.emit(ch, float64(q.ReadErrors), number, "read")
	queueErrors.emit(ch, float64(q.VerdictErrors), number, "verdict")
}
