package main

import (
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
			Name:    "portcullis_compile_duration_seconds",
			Help:    "Time to compile a state into policy.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
		}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "portcullis_repairs_total",
			Help: "Rules and sets that others had altered and that were put right.",
		}),
	}
	m.forgot = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "portcullis_forgotten_connections_total",
		Help: "Connections that the kernel was made to forget since the pod at an end has gone, or another has its address.",
	})
	m.registry.MustRegister(m.compile, m.repairs, m.forgot, agentCollector{a},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) compiled(took time.Duration) { m.compile.Observe(took.Seconds()) }
func (m *metrics) repaired(n int)              { m.repairs.Add(float64(n)) }

// family is one metric that agentCollector fills in at each scrape.
type family struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func counter(name, help string, labels ...string) family {
	return family{prometheus.NewDesc("portcullis_"+name, help, labels, nil), prometheus.CounterValue}
}

func gauge(name, help string, labels ...string) family {
	return family{prometheus.NewDesc("portcullis_"+name, help, labels, nil), prometheus.GaugeValue}
}

func (f family) emit(ch chan<- prometheus.Metric, value float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(f.desc, f.kind, value, labels...)
}

var (
	buildInfo = gauge("build_info", "Always 1; the label tells the version.", "version")
	ready     = gauge("ready", "1 when the agent is ready, else 0.")

	decisions  = counter("decisions_total", "Decisions by verdict and reason.", "verdict", "reason")
	directions = counter("directions_total", "Judged directions by how they fell.", "direction", "verdict")
	cacheHits  = counter("cache_hits_total", "Decisions that came from the flow cache.")
	latency    = prometheus.NewDesc("portcullis_verdict_latency_seconds", "Time from reading a packet to its verdict.", nil, nil)

	packets       = counter("queue_packets_total", "Packets that the kernel queued and the agent read.", "queue")
	queueErrors   = counter("queue_errors_total", "What went wrong on a queue, each time on the closed side.", "queue", "kind")
	queueDropped  = counter("queue_dropped_total", "Packets that the kernel couldn't queue: the queue was full, or the socket's buffer.", "queue", "full")
	queueWaiting  = gauge("queue_waiting_packets", "Packets that wait for a verdict.", "queue")
	logWritten    = counter("decision_log_records_total", "Decisions written to a sink of the decision log; a record about n repeats counts n.", "sink")
	logLost       = counter("decision_log_lost_total", "Decisions that a sink of the decision log lost: a ring or the sink's queue was full, or it refused.", "sink")
	logErrors     = counter("decision_log_errors_total", "Times that a sink of the decision log refused what was to be written.", "sink")
	logOmitted    = counter("decision_log_omitted_total", "Decisions left out of the decision log on purpose: not selected, sampled out, or suppressed by the rate limit.", "why")
	logHeld       = gauge("decision_log_held_decisions", "Denials that wait for the end of their window.")
	generation    = gauge("snapshot_generation", "Number of the policy snapshot in force.")
	statePods     = gauge("pods", "Pods in the state.")
	statePolicies = gauge("policies", "NetworkPolicies in the state.")
	isolated      = gauge("isolated_addresses", "Addresses of this node's isolated pods: what the sets hold.")
	judged        = gauge("judged_addresses", "Addresses of this node's pods.")
	problems      = gauge("invalid_objects", "What is wrong with objects while enforcement goes on: mistakes in policies, addresses that several pods claim.")
	filesWrong    = gauge("manifest_files_wrong", "Manifest files that are wrong now; the last good state of each, if there was one, is in force.")
	failedLoads   = counter("manifest_failed_loads_total", "Times that a manifest file was read and found wrong.")
	watchErrors   = counter("watch_errors_total", "What went wrong with lists and watches of the API server.", "resource")
	watchBroken   = gauge("watch_broken", "1 while a resource can't be watched, else 0; its last known state is in force.", "resource")
	stateAge      = gauge("state_age_seconds", "Time since the API server last said anything of a resource; bookmarks come every minute or so.", "resource")
	lastChange    = gauge("state_last_change_timestamp_seconds", "When the state last changed.")
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
	a.source.collect(ch)
	if s := a.engine.Snapshot(); s != nil {
		generation.emit(ch, float64(s.Generation()))
	}
	collectDecisionLog(ch, a.audit.Stats())
	a.spoof.collect(ch)
	a.mu.Lock()
	defer a.mu.Unlock()
	statePods.emit(ch, float64(a.state.pods))
	statePolicies.emit(ch, float64(a.state.policies))
	isolated.emit(ch, float64(a.state.isolated))
	judged.emit(ch, float64(a.state.judged))
	problems.emit(ch, float64(len(a.state.problems)))
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
	var byReason [64][2]uint64
	var egress, ingress [2]uint64
	for _, q := range queues {
		collectQueue(ch, q)
		hits += q.CacheHits
		for reason, n := range q.Decisions {
			byReason[reason][verdict.Deny] += n[verdict.Deny]
			byReason[reason][verdict.Allow] += n[verdict.Allow]
		}
		for v := range egress {
			egress[v] += q.Egress[v]
			ingress[v] += q.Ingress[v]
		}
	}
	cacheHits.emit(ch, float64(hits))
	for _, v := range []verdict.Verdict{verdict.Deny, verdict.Allow} {
		directions.emit(ch, float64(egress[v]), "egress", v.String())
		directions.emit(ch, float64(ingress[v]), "ingress", v.String())
		for _, reason := range verdict.Reasons() {
			if n := byReason[reason][v]; n > 0 {
				decisions.emit(ch, float64(n), v.String(), reason.String())
			}
		}
	}
	collectLatency(ch, queues)
	collectHeld(ch, queues)
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

// collectLatency sums the workers' histograms; Prometheus' buckets each hold
// the smaller ones too.
func collectLatency(ch chan<- prometheus.Metric, queues []filter.QueueStats) {
	bounds := filter.LatencyBounds()
	buckets := make(map[float64]uint64, len(bounds))
	var sum time.Duration
	var count uint64
	for _, q := range queues {
		sum += q.LatencySum
		for _, n := range q.Latency {
			count += n
		}
	}
	var below uint64
	for i, bound := range bounds {
		for _, q := range queues {
			below += q.Latency[i]
		}
		buckets[bound.Seconds()] = below
	}
	ch <- prometheus.MustNewConstHistogram(latency, count, sum.Seconds(), buckets)
}
