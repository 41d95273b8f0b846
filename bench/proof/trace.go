package proof

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"portcullis/bench/lab"
)

// traceRoot is where the kernel's tracing is. Each trace has an instance of its own
// there, beside those of others, which is removed at its end.
const traceRoot = "/sys/kernel/tracing"

// traceSpans are the parts of a first packet's way that trace events bound, in order.
var traceSpans = []string{
	"arrival at the node's interface → waking the worker: routing, conntrack, the chain, the message into the queue's socket",
	"waking it → it runs: **wake-up**",
	"it runs → the read returns: the packet's copy into user space",
	"the read returns → the verdict is written: parse, decide (ours, with Go's way in and out of both calls)",
	"the write begins → the packet leaves by the server's interface: verdict parsed, packet reinjected, the rest of the hooks, routing",
	"→ the write returns: delivery to the server's socket, and the way back of its answer, all within the call",
}

// traced is what a trace has found: nanoseconds of each span, packet by packet.
type traced [6][]int64

// trace records events of the kernel about an agent's threads and two interfaces.
type trace struct{ dir string }

// startTrace records until stop. An error says what the machine doesn't let one do.
func startTrace(threads []int, in, out string) (_ *trace, err error) {
	t := &trace{filepath.Join(traceRoot, "instances", fmt.Sprint("portcullis-proof-", os.Getpid()))}
	if err := os.Mkdir(t.dir, 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.remove())
		}
	}()
	any := func(field string) string {
		var parts []string
		for _, id := range threads {
			parts = append(parts, fmt.Sprintf("%s == %d", field, id))
		}
		return strings.Join(parts, " || ")
	}
	for _, w := range [][2]string{{"tracing_on", "0"}, {"buffer_size_kb", "4096"}, {"trace_clock", "mono"}} {
		if err := t.write(w[0], w[1]); err != nil {
			return nil, err
		}
	}
	for event, filter := range map[string]string{
		"net/netif_receive_skb": fmt.Sprintf("name == %q", in), "net/net_dev_queue": fmt.Sprintf("name == %q", out),
		"sched/sched_waking": any("pid"), "sched/sched_switch": any("next_pid"),
		"syscalls/sys_exit_recvmmsg": any("common_pid"), "syscalls/sys_enter_write": any("common_pid"), "syscalls/sys_exit_write": any("common_pid"),
	} {
		if err := errors.Join(t.write("events/"+event+"/filter", filter), t.write("events/"+event+"/enable", "1")); err != nil {
			return nil, err
		}
	}
	return t, t.write("tracing_on", "1")
}

func (t *trace) write(file, text string) error {
	return os.WriteFile(filepath.Join(t.dir, file), []byte(text), 0)
}

// stop ends the trace and gives what it recorded.
func (t *trace) stop() (string, error) {
	err := t.write("tracing_on", "0")
	b, rerr := os.ReadFile(filepath.Join(t.dir, "trace"))
	return string(b), errors.Join(err, rerr, t.remove())
}

// remove takes the instance away, its events and all.
func (t *trace) remove() error { return os.Remove(t.dir) }

// traceLine is "comm-pid [cpu] flags seconds: event".
var traceLine = regexp.MustCompile(`^.*-(\d+)\s+\[(\d+)\] \S+\s+(\d+)\.(\d+): (.*)$`)

// readTrace finds the packets whose whole way was recorded: one that arrived, woke a
// worker that slept, was read, and answered by a write that sent a packet on.
func readTrace(text string) (found traced) {
	arrived := map[int]int64{} // by CPU
	on := map[int][]int64{}    // by worker: the moments so far
	step := func(worker, at int, now int64) {
		if moments := on[worker]; len(moments) == at {
			on[worker] = append(moments, now)
		} else if at < 5 || len(moments) != at {
			delete(on, worker)
		}
	}
	for line := range strings.Lines(text) {
		m := traceLine.FindStringSubmatch(strings.TrimRight(line, "\n"))
		if m == nil {
			continue
		}
		task, cpu, now, event := number0(m[1]), number0(m[2]), moment(m[3], m[4]), m[5]
		switch {
		case strings.HasPrefix(event, "netif_receive_skb:"):
			arrived[cpu] = now
		case strings.HasPrefix(event, "sched_waking:"):
			if at, ok := arrived[cpu]; ok {
				on[field(event, "pid=")] = []int64{at, now}
				delete(arrived, cpu)
			}
		case strings.HasPrefix(event, "sched_switch:"):
			step(field(event, "next_pid="), 2, now)
		case strings.HasPrefix(event, "sys_recvmmsg ->"):
			step(task, 3, now)
		case strings.HasPrefix(event, "sys_write("):
			step(task, 4, now)
		case strings.HasPrefix(event, "net_dev_queue:"):
			if len(on[task]) == 5 {
				step(task, 5, now)
			}
		case strings.HasPrefix(event, "sys_write ->"):
			step(task, 6, now)
			if moments := on[task]; len(moments) == 7 {
				for i := range found {
					found[i] = append(found[i], moments[i+1]-moments[i])
				}
			}
			delete(on, task)
		}
	}
	return found
}

func number0(s string) int {
	n, _ := strconv.Atoi(s)
	return n
}

// moment reads "seconds.micros" as nanoseconds.
func moment(seconds, fraction string) int64 {
	s, _ := strconv.ParseInt(seconds, 10, 64)
	f, _ := strconv.ParseInt((fraction + "000000000")[:9], 10, 64)
	return s*1e9 + f
}

// field reads the number behind a name in an event's text.
func field(event, name string) int {
	i := strings.Index(event, " "+name)
	if i < 0 {
		return -1
	}
	digits, _, _ := strings.Cut(event[i+1+len(name):], " ")
	return number0(digits)
}

// measureTrace makes connections one after the other through a world's agent while the
// kernel traces it. What the machine refuses is given as refused, and is no error.
func (w *world) measureTrace(ctx context.Context, p Params) (found traced, refused, err error) {
	if err := w.thaw(ctx); err != nil {
		return found, nil, err
	}
	defer func() { err = errors.Join(err, w.freeze()) }()
	in, err := w.deviceTo(ctx, firstClient)
	if err != nil {
		return found, nil, err
	}
	out, err := w.deviceTo(ctx, firstServer)
	if err != nil {
		return found, nil, err
	}
	threads, err := w.threads()
	if err != nil {
		return found, nil, err
	}
	t, refused := startTrace(threads, in, out)
	if refused != nil {
		return found, refused, nil
	}
	_, err = w.connects(ctx, p, map[figure]float64{})
	text, terr := t.stop()
	return readTrace(text), nil, errors.Join(err, terr)
}

var deviceWord = regexp.MustCompile(` dev (\S+)`)

// deviceTo names the node's interface on the way to an address.
func (w *world) deviceTo(ctx context.Context, to netip.Addr) (string, error) {
	out, err := w.lab.Command(ctx, lab.Node, "ip", "-o", "route", "get", to.String())
	if err != nil {
		return "", err
	}
	m := deviceWord.FindStringSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("no interface on the way to %s: %s", to, out)
	}
	return m[1], nil
}

// threads lists the threads of the world's process.
func (w *world) threads() (ids []int, err error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", w.gate.PID()))
	for _, e := range entries {
		ids = append(ids, number0(e.Name()))
	}
	slices.Sort(ids)
	return ids, err
}
