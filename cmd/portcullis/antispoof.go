package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"portcullis/filter"
	"portcullis/policycache/cni"
	"portcullis/verdict"
)

// antiSpoof has the kernel drop what leaves a pod's interface with an address that
// isn't the pod's. A nil antiSpoof does nothing.
type antiSpoof struct {
	kernel  *filter.AntiSpoof
	results *cni.Watcher // nil without --cni-results
	log     *slog.Logger
	wake    chan struct{} // holds one

	mu      sync.Mutex
	without []string // pods whose interface isn't known
	err     error    // what keeps the kernel from dropping
}

func newAntiSpoof(results *cni.Watcher, log *slog.Logger) *antiSpoof {
	return &antiSpoof{kernel: filter.NewAntiSpoof(log), results: results, log: log, wake: make(chan struct{}, 1)}
}

// look says that pods may have changed.
func (s *antiSpoof) look() {
	if s == nil {
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// spoofUntil keeps the kernel informed which pod is behind which interface, as pods
// come and go and every now and then, until ctx ends. It is off the way of policy.
func (a *agent) spoofUntil(ctx context.Context) {
	if a.spoof == nil {
		return
	}
	tick := time.NewTicker(repairInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.spoof.wake:
			a.update(false)
		case <-tick.C:
			a.update(true)
		}
	}
}

// removeLeftSpoof takes away what an agent with --anti-spoof has left, where this one
// goes without.
func (a *agent) removeLeftSpoof() {
	if a.spoof != nil {
		return
	}
	if err := filter.RemoveAntiSpoof(); err != nil {
		a.log.Warn("what an agent with --anti-spoof has left can't be removed", "err", err)
	}
}

// update finds the pods' interfaces and tells the kernel. A repair first puts right
// what others have altered, and counts it.
func (a *agent) update(repair bool) {
	s := a.spoof
	a.mu.Lock()
	ours := a.queues != nil // or else another agent's
	a.mu.Unlock()
	if !ours {
		return
	}
	snapshot := a.engine.Snapshot()
	var err error
	if repair {
		var repaired []string
		repaired, err = s.kernel.Repair()
		a.metrics.repaired(len(repaired))
	}
	links, without, findErr := filter.FindPodLinks(s.pods(snapshot))
	if err == nil {
		err = findErr
	}
	if findErr == nil {
		if setErr := s.kernel.Set(links); setErr != nil {
			err = setErr
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pod := range without {
		if !slices.Contains(s.without, pod) {
			s.log.Warn("a pod's interface isn't known: what it sends is not looked at for forged addresses", "pod", pod)
		}
	}
	s.without = without
	a.note("anti-spoofing doesn't work", &s.err, err)
}

// pods lists the pods that are judged here, with what is known of their interfaces.
func (s *antiSpoof) pods(snapshot *verdict.Snapshot) (pods []filter.LinkedPod) {
	var links map[cni.PodID][]string
	if s.results != nil {
		links = s.results.Links()
	}
	at := map[*verdict.Endpoint]int{}
	for _, addr := range snapshot.JudgedAddrs() {
		e := snapshot.Endpoint(addr)
		i, ok := at[e]
		if !ok {
			i = len(pods)
			at[e] = i
			names, known := links[cni.PodID{Key: e.Key(), UID: e.UID}]
			if !known {
				names = links[cni.PodID{Key: e.Key()}]
			}
			pods = append(pods, filter.LinkedPod{Name: e.Key(), Links: names})
		}
		pods[i].Addrs = append(pods[i].Addrs, addr)
	}
	return pods
}

func (s *antiSpoof) unready() []string {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return []string{"anti-spoof: " + oneLine(s.err)}
	}
	return nil
}

func (s *antiSpoof) describe(w io.Writer) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(w, "[i] anti-spoof: %d interfaces, %d packets dropped\n", s.kernel.Links(), s.kernel.Dropped())
	for _, pod := range s.without {
		fmt.Fprintf(w, "[!] anti-spoof: the interface of %s isn't known, what it sends is not looked at\n", pod)
	}
}

var (
	spoofed    = counter("spoofed_packets_total", "Packets that left a pod's interface with an address that isn't the pod's, and were dropped.")
	spoofLinks = gauge("spoof_guarded_interfaces", "Pods' interfaces that are watched for forged addresses.")
	spoofBlind = gauge("spoof_unguarded_pods", "Pods whose interface isn't known, so that nobody watches it.")
)

func (s *antiSpoof) collect(ch chan<- prometheus.Metric) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	spoofed.emit(ch, float64(s.kernel.Dropped()))
	spoofLinks.emit(ch, float64(s.kernel.Links()))
	spoofBlind.emit(ch, float64(len(s.without)))
}
