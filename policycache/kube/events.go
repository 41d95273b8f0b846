package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"portcullis/verdict"
)

// EventReason is the reason of the events on pods whose connections are denied.
const EventReason = "ConnectionDenied"

const (
	// eventsEvery is how long denials are gathered into one event.
	eventsEvery = 5 * time.Second
	// maxGathered is how many different events may be in the making; more are
	// suppressed.
	maxGathered = 512
	// eventsPerSecond and eventsBurst are what one agent may write.
	eventsPerSecond = 1
	eventsBurst     = 20
)

// Events writes Kubernetes events on pods whose connections are denied, so that
// kubectl describe shows them: on the pod that wanted to connect, or, where that is
// none, on the one that was to be connected to. Those of one pod that say the same
// are counted together, and client-go joins what is similar.
type Events struct {
	log         *slog.Logger
	every       time.Duration
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
	limiter     *rate.Limiter

	mu       sync.Mutex
	gathered map[event]int
	stats    EventStats
	trouble  error
}

// EventStats counts events.
type EventStats struct {
	Written    uint64 // to the API server
	Refused    uint64 // by the API server, or it didn't answer
	Suppressed uint64 // since there were too many
}

// event is what one event tells, but for the number of connections.
type event struct {
	namespace, pod, uid string
	text                string
}

// NewEvents makes a writer for the agent of a node. Nothing is written before Run.
func NewEvents(client *Client, node string, log *slog.Logger) *Events {
	e := &Events{log: log, every: eventsEvery, gathered: map[event]int{}, limiter: rate.NewLimiter(eventsPerSecond, eventsBurst)}
	e.broadcaster = record.NewBroadcaster()
	e.recorder = e.broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "portcullis", Host: node})
	e.broadcaster.StartRecordingToSink(sink{&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events("")}, e})
	return e
}

// Denied takes in a denied connection. It returns at once.
func (e *Events) Denied(f *verdict.Flow, d *verdict.Decision) {
	about, ok := eventOf(f, d)
	if !ok {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, known := e.gathered[about]; !known && len(e.gathered) >= maxGathered {
		e.stats.Suppressed++
		return
	}
	e.gathered[about]++
}

// Run writes what is gathered until ctx ends, and then the rest.
func (e *Events) Run(ctx context.Context) {
	tick := time.NewTicker(e.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			e.write()
			e.broadcaster.Shutdown()
			return
		case <-tick.C:
			e.write()
		}
	}
}

// write hands over what is gathered, as far as the rate allows.
func (e *Events) write() {
	e.mu.Lock()
	gathered := e.gathered
	e.gathered = map[event]int{}
	e.mu.Unlock()
	order := func(a, b event) int {
		return strings.Compare(a.namespace+"/"+a.pod+a.text, b.namespace+"/"+b.pod+b.text)
	}
	for _, about := range slices.SortedFunc(maps.Keys(gathered), order) {
		if !e.limiter.Allow() {
			e.mu.Lock()
			e.stats.Suppressed++
			e.mu.Unlock()
			continue
		}
		connections := "1 connection"
		if n := gathered[about]; n > 1 {
			connections = fmt.Sprintf("%d connections", n)
		}
		pod := &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: about.namespace, Name: about.pod, UID: types.UID(about.uid)}
		e.recorder.Event(pod, corev1.EventTypeWarning, EventReason, connections+" "+about.text)
	}
}

// Stats gives the counts.
func (e *Events) Stats() EventStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

// Trouble is what the last event met with, nil if it was written.
func (e *Events) Trouble() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.trouble
}

// note counts an event, and tells once what is in the way.
func (e *Events) note(err error) {
	if apierrors.IsForbidden(err) {
		err = fmt.Errorf("the agent may not create and patch events: kustomize/components/events gives the right: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	before := e.trouble
	e.trouble = err
	if err == nil {
		e.stats.Written++
		return
	}
	e.stats.Refused++
	if before == nil || before.Error() != err.Error() && !(apierrors.IsForbidden(before) && apierrors.IsForbidden(err)) {
		e.log.Error("events on denied pods can't be written", "err", err)
	}
}

// sink looks at what becomes of events.
type sink struct {
	record.EventSink
	e *Events
}

func (s sink) Create(event *corev1.Event) (*corev1.Event, error) {
	event, err := s.EventSink.Create(event)
	s.e.note(err)
	return event, err
}

func (s sink) Patch(event *corev1.Event, data []byte) (*corev1.Event, error) {
	event, err := s.EventSink.Patch(event, data)
	var status *apierrors.StatusError
	if !errors.As(err, &status) || !apierrors.IsNotFound(err) { // else it is made anew
		s.e.note(err)
	}
	return event, err
}

// eventOf says on which pod a denial is told, and how. It is false if neither end
// is a pod.
func eventOf(f *verdict.Flow, d *verdict.Decision) (event, bool) {
	var by []string
	for _, s := range []*verdict.Side{&d.Egress, &d.Ingress} {
		if s.Verdict == verdict.Deny {
			by = append(by, s.Policies()...)
		}
	}
	denied := " denied"
	if len(by) > 0 {
		denied += " by " + strings.Join(by, ", ")
	}
	if d.Reason != verdict.ReasonNoRule {
		denied += " (" + d.Reason.String() + ")"
	}
	switch {
	case d.Src != nil:
		return event{d.Src.Namespace, d.Src.Name, d.Src.UID, "to " + target(f, d.Dst) + denied}, true
	case d.Dst != nil:
		return event{d.Dst.Namespace, d.Dst.Name, d.Dst.UID, "from " + f.Src.String() + " to " + service(f) + denied}, true
	}
	return event{}, false
}

// target names the destination: "default/db:5432", "[2001:db8::1]:53 (UDP)",
// "default/db (ICMP)".
func target(f *verdict.Flow, pod *verdict.Endpoint) string {
	ports := f.Proto.HasPorts() && f.Defect == verdict.ReasonNone
	name := f.Dst.String()
	switch {
	case pod != nil:
		name = pod.Key()
	case ports:
		name = strings.TrimSuffix(netip.AddrPortFrom(f.Dst, 0).String(), ":0")
	}
	if ports {
		name = fmt.Sprintf("%s:%d", name, f.DstPort)
	}
	if !ports || f.Proto != verdict.TCP {
		name += " (" + f.Proto.String() + ")"
	}
	return name
}

func service(f *verdict.Flow) string {
	if f.Proto.HasPorts() && f.Defect == verdict.ReasonNone {
		return fmt.Sprintf("%s %d", f.Proto, f.DstPort)
	}
	return f.Proto.String()
}
