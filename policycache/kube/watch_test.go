package kube

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"

	"portcullis/policycache"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func pod(namespace, name, ip string, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u", Labels: labels, Annotations: map[string]string{"a": "b"}},
		Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{
			Name: "c", Image: "registry.example/shop/web:v1", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
		}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}},
	}
}

// started runs a watcher on a fake server that holds the objects, and gives the
// states that it applies.
func started(t *testing.T, objects ...apiruntime.Object) (*fake.Clientset, *Watcher, <-chan *policycache.Objects) {
	t.Helper()
	server := fake.NewClientset(objects...)
	w := NewWatcher(&Client{Interface: server, heard: newHeard()}, quiet())
	states := make(chan *policycache.Objects, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, func(o *policycache.Objects) { states <- o }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != context.Canceled {
			t.Errorf("Run ended with %v", err)
		}
	})
	return server, w, states
}

// next waits for a state of which ok holds; the deadline is for hangs only.
func next(t *testing.T, states <-chan *policycache.Objects, what string, ok func(*policycache.Objects) bool) *policycache.Objects {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case o := <-states:
			if ok(o) {
				return o
			}
		case <-deadline:
			t.Fatalf("no state in which %s", what)
		}
	}
}

func TestWatcherFollows(t *testing.T) {
	ctx := context.Background()
	server, _, states := started(t, pod("shop", "web", "10.0.0.1", nil), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}})
	first := next(t, states, "anything is there", func(*policycache.Objects) bool { return true })
	if p := first.Pods["shop/web"]; p == nil || p.IPs[0] != netip.MustParseAddr("10.0.0.1") || p.Ports[0].Name != "http" || first.Nodes["n1"] == nil {
		t.Fatalf("the first state isn't whole: %+v", first)
	}
	if _, err := server.CoreV1().Pods("shop").Update(ctx, pod("shop", "web", "10.0.0.1", map[string]string{"app": "web"}), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	next(t, states, "the pod has its label", func(o *policycache.Objects) bool { return o.Pods["shop/web"].Labels["app"] == "web" })
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"}}
	if _, err := server.NetworkingV1().NetworkPolicies("shop").Create(ctx, np, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	next(t, states, "the policy is there", func(o *policycache.Objects) bool { return o.Policies["shop/db"] != nil })
	if err := server.CoreV1().Pods("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	next(t, states, "the pod is gone", func(o *policycache.Objects) bool { return o.Pods["shop/web"] == nil })
	if first.Pods["shop/web"] == nil {
		t.Error("a state that was handed over changed afterwards")
	}
}

// TestWhatPolicyDoesNotSeeCostsNothing sends what a cluster is full of:
// heartbeats, annotations, image changes.
func TestWhatPolicyDoesNotSeeCostsNothing(t *testing.T) {
	w := NewWatcher(&Client{heard: newHeard()}, quiet())
	send := func(p *corev1.Pod) {
		o, err := transform(p)
		if err != nil {
			t.Fatal(err)
		}
		w.event(o, false)
	}
	send(pod("shop", "web", "10.0.0.1", nil))
	before := w.Status().Events
	for i := range 100 {
		p := pod("shop", "web", "10.0.0.1", nil)
		p.ResourceVersion, p.Annotations["beat"] = fmt.Sprint(i), fmt.Sprint(i)
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, LastProbeTime: metav1.Now()}}
		p.Spec.Containers[0].Image = fmt.Sprint(i)
		send(p)
	}
	if n := w.Status().Events - before; n != 0 {
		t.Errorf("%d of 100 events that policy can't see changed the state", n)
	}
	send(pod("shop", "web", "10.0.0.2", nil))
	if n := w.Status().Events - before; n != 1 {
		t.Errorf("a new address counted as %d changes", n)
	}
}

// TestNamespaceAnnotations: the one that the decision log looks at is followed, the
// others cost nothing.
func TestNamespaceAnnotations(t *testing.T) {
	w := NewWatcher(&Client{heard: newHeard()}, quiet())
	send := func(annotations map[string]string) uint64 {
		o, err := transform(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "u", Annotations: annotations}})
		if err != nil {
			t.Fatal(err)
		}
		w.event(o, false)
		return w.Status().Events
	}
	if send(nil) != 1 || send(map[string]string{"a": "b"}) != 1 {
		t.Error("an annotation of others is a change")
	}
	if send(map[string]string{policycache.AuditAnnotation: "denied"}) != 2 || w.state.take().Namespaces["shop"].Audit != "denied" {
		t.Error("the decision log's annotation isn't followed")
	}
}

// TestBurstsAreCoalesced lets a thousand pods come while one state is being
// applied: they make one more, and the last is whole.
func TestBurstsAreCoalesced(t *testing.T) {
	server := fake.NewClientset()
	w := NewWatcher(&Client{Interface: server, heard: newHeard()}, quiet())
	var applied atomic.Int64
	var last atomic.Int64
	held := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go w.Run(ctx, func(o *policycache.Objects) {
		if applied.Add(1) == 2 {
			<-held
		}
		last.Store(int64(len(o.Pods)))
	})
	waitFor(t, "the first state", func() bool { return w.Status().Loaded })
	for i := range 1000 {
		o, err := transform(pod("shop", fmt.Sprint("p", i), "10.0.0.1", nil))
		if err != nil {
			t.Fatal(err)
		}
		w.event(o, false)
	}
	close(held)
	waitFor(t, "the last state", func() bool { return last.Load() == 1000 })
	if n := applied.Load(); n > 4 {
		t.Errorf("a burst of 1,000 changes was applied in %d states", n-1)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestMissedDeletion hands over what an informer does when it learns of a
// deletion only from the next list.
func TestMissedDeletion(t *testing.T) {
	w := NewWatcher(&Client{heard: newHeard()}, quiet())
	o, err := transform(pod("shop", "web", "10.0.0.1", nil))
	if err != nil {
		t.Fatal(err)
	}
	w.event(o, false)
	w.event(cache.DeletedFinalStateUnknown{Key: "shop/web", Obj: o}, true)
	if n := len(w.state.take().Pods); n != 0 {
		t.Errorf("%d pods after the deletion", n)
	}
}

func TestTransformRefusesStrangers(t *testing.T) {
	if _, err := transform(&corev1.Secret{}); err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("a Secret: %v", err)
	}
}

// TestPodMemory holds what a pod costs in the informer's cache and the state
// together. Each is decoded from protobuf, as it comes from the server, so that
// no string is shared that wouldn't be.
func TestPodMemory(t *testing.T) {
	const pods = 10_000
	encoded := make([][]byte, pods)
	for i := range encoded {
		p := pod(fmt.Sprint("namespace-", i%1000), fmt.Sprintf("deployment-7d9c7b8f-%05d", i), fmt.Sprintf("10.64.%d.%d", i>>8, i&255), map[string]string{
			"app": fmt.Sprint("app-", i%100), "pod-template-hash": fmt.Sprint("7d9c7b8f", i%300), "app.kubernetes.io/part-of": "shop",
		})
		p.UID = "5a1b7a58-0d6c-4a5f-9f0e-0123456789ab"
		p.Annotations["kubectl.kubernetes.io/last-applied-configuration"] = strings.Repeat("x", 2000)
		var err error
		if encoded[i], err = p.Marshal(); err != nil {
			t.Fatal(err)
		}
	}
	before := heapBytes()
	store := cache.NewStore(cache.DeletionHandlingMetaNamespaceKeyFunc)
	s := newState()
	for _, b := range encoded {
		p := new(corev1.Pod)
		if err := p.Unmarshal(b); err != nil {
			t.Fatal(err)
		}
		o, err := transform(p)
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Add(o); err != nil {
			t.Fatal(err)
		}
		s.set(o.(*slim))
	}
	each := (heapBytes() - before) / pods
	runtime.KeepAlive(store)
	runtime.KeepAlive(s)
	runtime.KeepAlive(encoded)
	t.Logf("%d bytes per pod", each)
	if each > 1024 {
		t.Errorf("a pod costs %d bytes, more than 1,024", each)
	}
}

func heapBytes() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
