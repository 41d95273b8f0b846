package proof

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"

	"portcullis/bench/lab"
)

// figure is something that is measured once a round. Times are in microseconds,
// rates per second.
type figure string

// The figures.
const (
	connectP50 figure = "connect p50"
	connectP99 figure = "connect p99"
	firstP50   figure = "UDP first packet p50"
	firstP99   figure = "UDP first packet p99"
	denialP50  figure = "denial p50"
	streamRate figure = "stream Gbit/s"
	logAllow   figure = "log latency, allow p50"
	logDeny    figure = "log latency, deny p50"
	failures   figure = "failed"
	resent     figure = "SYNs sent again"
)

// floodFigure is connections per second of clients at once over pairs of pods.
func floodFigure(clients, pairs int) figure {
	return figure(fmt.Sprintf("conns/s, %d× over %d", clients, pairs))
}

// found is what one round has found of one variant.
type found map[figure]float64

// measureOnce measures all of a variant's figures once. It gives the latencies of
// the sequential connects, in microseconds, besides.
func (w *world) measureOnce(ctx context.Context, p Params) (f found, connects []float64, err error) {
	f = found{}
	if err := w.thaw(ctx); err != nil {
		return nil, nil, err
	}
	defer func() {
		if ferr := w.freeze(); err == nil {
			err = ferr
		}
	}()
	// The first connections fill neighbour tables and caches.
	var r load
	if err := w.ask(ctx, &r, "connect", append(pairArgs(p.Pairs), "-tries", fmt.Sprint(2*p.Pairs))...); err != nil {
		return nil, nil, err
	}
	if err := w.forget(ctx); err != nil {
		return nil, nil, err
	}
	if connects, err = w.connects(ctx, p, f); err != nil {
		return nil, nil, err
	}
	for _, step := range []func(context.Context, Params, found) error{w.floods, w.datagrams, w.throughput} {
		if err := step(ctx, p, f); err != nil {
			return nil, nil, err
		}
	}
	return f, connects, w.readLog(f)
}

// forget empties the node's connection table, so that each measurement finds it as
// the others do, and no port is known from before.
func (w *world) forget(ctx context.Context) error {
	_, err := w.lab.Command(ctx, lab.Node, "conntrack", "-F")
	return err
}

// clientStarts is how many client processes share a round's sequential connects:
// where the scheduler puts a client, and so where the queue's reader wakes up,
// often stays as it is for a process' whole life.
const clientStarts = 4

func (w *world) connects(ctx context.Context, p Params, f found) ([]float64, error) {
	var all []int64
	for range clientStarts {
		var r load
		tries := max(1, p.Connects/clientStarts)
		if err := w.ask(ctx, &r, "connect", append(pairArgs(1), "-keep", "-tries", fmt.Sprint(tries))...); err != nil {
			return nil, err
		}
		f[failures] += float64(r.Failed)
		f[resent] += float64(r.Resent)
		all = append(all, r.LatencyNs...)
	}
	sorted := micros(all)
	f[connectP50], f[connectP99] = percentile(sorted, 0.5), percentile(sorted, 0.99)
	return sorted, nil
}

// micros converts nanoseconds and sorts.
func micros(ns []int64) []float64 {
	out := make([]float64, len(ns))
	for i, n := range ns {
		out[i] = float64(n) / 1e3
	}
	slices.Sort(out)
	return out
}

func (w *world) floods(ctx context.Context, p Params, f found) error {
	for _, clients := range []int{1, p.Clients} {
		for _, pairs := range []int{1, p.Pairs} {
			if err := w.forget(ctx); err != nil {
				return err
			}
			var r load
			args := append(pairArgs(pairs), "-clients", fmt.Sprint(clients), "-for", p.Flood.String())
			if err := w.ask(ctx, &r, "connect", args...); err != nil {
				return err
			}
			f[failures] += float64(r.Failed)
			f[resent] += float64(r.Resent)
			f[floodFigure(clients, pairs)] = float64(r.Count) / (float64(r.ElapsedNs) / 1e9)
		}
	}
	return nil
}

// datagrams measures first packets, and, where policy denies anything, how much
// later one gets through behind one that is denied.
func (w *world) datagrams(ctx context.Context, p Params, f found) error {
	if err := w.forget(ctx); err != nil {
		return err
	}
	args := append(pairArgs(1), "-tries", fmt.Sprint(p.Datagrams))
	var r load
	if err := w.ask(ctx, &r, "udp", args...); err != nil {
		return err
	}
	f[failures] += float64(r.Failed)
	sorted := micros(r.LatencyNs)
	f[firstP50], f[firstP99] = percentile(sorted, 0.5), percentile(sorted, 0.99)
	if w.kind != agentKind {
		return nil
	}
	var behind load
	if err := w.ask(ctx, &behind, "udp", append(args, "-ahead")...); err != nil {
		return err
	}
	f[failures] += float64(behind.Failed)
	f[denialP50] = percentile(micros(behind.LatencyNs), 0.5) - f[firstP50]
	return nil
}

func (w *world) throughput(ctx context.Context, p Params, f found) error {
	var r load
	if err := w.ask(ctx, &r, "stream", append(pairArgs(1), "-for", p.Stream.String())...); err != nil {
		return err
	}
	f[streamRate] = float64(r.Bytes) * 8 / float64(r.ElapsedNs)
	return nil
}

// readLog takes from the decision log what has been added since it was last read:
// the agent's own measure, from reading a packet to its verdict.
func (w *world) readLog(f found) error {
	if !w.log {
		return nil
	}
	file, err := os.Open(w.logFile)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Seek(w.logRead, io.SeekStart); err != nil {
		return err
	}
	took := map[string][]int64{}
	lines := bufio.NewReader(file)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			break // what is left is half a line
		}
		w.logRead += int64(len(line))
		var d struct {
			Verdict   string
			LatencyNs int64
		}
		if err := json.Unmarshal(line, &d); err != nil {
			return fmt.Errorf("decision log: %w: %s", err, line)
		}
		took[d.Verdict] = append(took[d.Verdict], d.LatencyNs)
	}
	f[logAllow], f[logDeny] = percentile(micros(took["allow"]), 0.5), percentile(micros(took["deny"]), 0.5)
	return nil
}

// valuesOf gives a figure round by round; a round without it gives NaN.
func valuesOf(rounds []found, what figure) []float64 {
	out := make([]float64, len(rounds))
	for i, f := range rounds {
		v, ok := f[what]
		if !ok {
			v = math.NaN()
		}
		out[i] = v
	}
	return out
}
