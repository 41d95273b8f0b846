package proof

import (
	"strings"
)

// sayBudget says where one connection's time goes, by differences of variants, by
// the clock of an echo, and by microbenchmarks.
func (r *Results) sayBudget(t *text) {
	if len(r.stages.Write) == 0 {
		return
	}
	t.say("## Budget\n\nOf one connection, one after the other, medians:")
	e := agentName(r.Params.Policies[0])
	arrive, handle, write := micros(r.stages.Arrive), micros(r.stages.Handle), micros(r.stages.Write)
	of := func(values []float64) string { return number(percentile(values, 0.5)) }
	staged := r.staged
	t.table([]string{"part", "µs", "from"}, [][]string{
		{"the connection itself, both ends' sockets and all forwarding", r.summary(none, connectP50).String(), "(a)"},
		{"conntrack and the chain", summarize(r.extra0(conntrack, none)).String(), "(b) − (a)"},
		{"queue: enqueue, wake-up, read, verdict, reinject", summarize(r.extra(pinnedName)).String(), "(c′) − (b)"},
		{"Portcullis beyond the echo", summarize(r.extra0(e, pinnedName)).String(), "(e) − (c′)"},
		{"what reading elsewhere than on the packet's CPU would cost", summarize(r.extra0(echoName, pinnedName)).String(), "(c) − (c′)"},
	})
	t.say("Inside the queue's part, by the clock of a (c′) that stamps each step (its connects took %s µs at the median, clock and stamps included):", of(staged))
	t.table([]string{"step", "p50 µs", "p99 µs"}, [][]string{
		{"arrival at the node's interface → in the reader's hands: routing, conntrack, chain, netlink message, **wake-up**, read", of(arrive), number(percentile(arrive, 0.99))},
		{"the reader: finding the id, filling in the verdict", of(handle), number(percentile(handle, 0.99))},
		{"the write: verdict parsed, packet reinjected and delivered to the server's socket, all within the call", of(write), number(percentile(write, 0.99))},
	})
	r.sayTrace(t, e)
	t.say("Portcullis' own steps, by microbenchmarks run at the end of the same run:")
	var rows [][]string
	for _, name := range r.benchNames() {
		rows = append(rows, []string{"`" + name + "`", number(r.micro[name]), budgetPart(name)})
	}
	t.table([]string{"benchmark", "ns", "what of the path"}, rows)
	r.sayShare(t, e)
}

// sayTrace says what the kernel's own trace events tell of one first packet's way.
func (r *Results) sayTrace(t *text, e string) {
	switch {
	case r.refused != nil:
		t.say("The kernel's share step by step isn't here: this machine doesn't let its kernel be traced (%v).\n", r.refused)
		return
	case len(r.traced[0]) == 0:
		t.say("The kernel's share step by step isn't here: no packet's whole way was in the trace.\n")
		return
	}
	t.say("The first packet's way through `%s` by the kernel's own trace events (net, sched, syscalls), of %s packets that woke a sleeping worker. Each event costs some tenths of a microsecond, which is in these figures; the kernel writes whole microseconds, hence means:",
		e, number(float64(len(r.traced[0]))))
	var rows [][]string
	for i, span := range traceSpans {
		sorted := micros(r.traced[i])
		rows = append(rows, []string{span, number(middle(sorted)), number(percentile(sorted, 0.99))})
	}
	t.table([]string{"step", "mean of the middle half, µs", "p99 µs"}, rows)
}

// middle is the mean of the middle half of sorted values, which outliers don't move,
// and which is finer than the values are.
func middle(sorted []float64) float64 {
	half := sorted[len(sorted)/4 : len(sorted)-len(sorted)/4]
	sum := 0.0
	for _, v := range half {
		sum += v
	}
	return sum / float64(len(half))
}

// extra0 is the difference of two variants' medians, by round.
func (r *Results) extra0(variant, from string) []float64 {
	return differences(valuesOf(r.rounds[variant], connectP50), valuesOf(r.rounds[from], connectP50))
}

func budgetPart(name string) string {
	switch {
	case strings.HasPrefix(name, "ParsePacket"):
		return "parse: the netlink message"
	case strings.HasPrefix(name, "Decode"):
		return "parse: the packet's headers"
	case strings.HasPrefix(name, "Worker"):
		return "parse, decide, count, and two system calls on a socket pair in place of the kernel's queue"
	case strings.HasPrefix(name, "Put"):
		return "log: into the ring, and out again"
	}
	return ""
}

// sayShare says what share is ours, measured two ways, and what would take it away.
func (r *Results) sayShare(t *text, e string) {
	whole := r.summary(e, connectP50).median
	ours := summarize(r.extra0(e, pinnedName)).median
	logged := r.summary(logName, logAllow).median
	t.say("Ours, measured from outside, (e) − (c′): %s µs of %s, %s %%. Part of that is the kernel's, asked for by us: the mark, the second way through the hook (NF_REPEAT) and the rules that save the mark, which the echo doesn't ask for (`make bench-tune`: echo-again).",
		number(ours), number(whole), number(100*ours/whole))
	t.say("\nOurs, measured from inside, the decision log's time from reading a packet to its verdict: %s µs, %s %%.", number(logged), number(100*logged/whole))
	t.say("\nWhat would take the rest away isn't in this process: the wake-up and the two system calls are NFQUEUE's price, and go only with the queue, that is with verdicts in the kernel (an nftables map or an eBPF program that the compiled policy is loaded into), at the price of saying why.")
}

// howMeasured tells readers what the figures mean.
const howMeasured = `
## How it is measured

Each variant has network namespaces of its own: a node that forwards, one namespace
for all measured clients and one for all measured servers, a veth pair to each. Pairs
of pods are pairs of addresses there; the node can't tell the difference, but for the
number of interfaces. All is IPv4. Clients are threads that block in connect(2); a
connection is reset at once by its client. "connect" is the time of that call: SYN,
verdict, SYN-ACK. "UDP first packet" is from send to the echo's arrival, on a fresh
port each time. Before each measurement the node's connection table is emptied, and
while a variant is measured the processes of the others are stopped. Loads, servers,
echoes and the agent are processes of their own.

- (b), (c) and (d) have the chains that the agent itself has put in place, with ten
  policies, before it was killed. In (b) the two NFQUEUE rules return. In (c) and (d)
  packets are spread over the queues by their addresses and the readers go wherever
  the scheduler puts them; Portcullis has each CPU's packets read on that CPU, which
  is why it may well be faster than the echo. (c′) is an echo that does the same.
- (c) answers NF_ACCEPT. Portcullis answers with a mark and NF_REPEAT, which costs the
  kernel more; the difference is Portcullis', and is in (e) − (c′).
- Of the policies on the pod only the last admits the clients; each other one admits
  another pod's address to one port. So chains are walked to their end, which is the
  worst case for (f); half of it would be the mean.
- (f) leaves out what kube-router has besides, IPv6, egress and pods without policies
  among it. Its change is what kube-router does at every change: read the table, fill
  all sets, restore the whole table under new names.
- A denied SYN has no answer, so a denial is timed by what comes behind it in the same
  queue: an admitted datagram sent right after a denied one.
- Everything shares the machine's CPUs, clients and servers included.
`
