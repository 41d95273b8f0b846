package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/bench"
	"portcullis/bench/lab"
	"portcullis/policycache"
)

// residentBound is the most that the whole agent may have resident, in MiB, at
// memoryPods pods and as many policies.
const (
	residentBound = 128
	memoryPods    = 10_000
)

// TestMemoryOfTheAgent runs the agent on a large cluster and holds its resident
// memory, its program and all, when it has settled and when the cluster changes.
func TestMemoryOfTheAgent(t *testing.T) {
	w := newWorld(t, "memory")
	objects := bench.Cluster(memoryPods, memoryPods)
	w.must(lab.WriteFile(filepath.Join(w.dir, "cluster.json"), manifestsOf(t, objects)))
	p, err := w.lab.Run(context.Background(), lab.Node, binary, "agent", "--manifests", w.dir, "--node", "node-1", "--http", httpAddr)
	w.must(err)
	w.agent = p
	w.untilWithin(time.Minute, "the agent is ready", func() error { _, err := w.get("/readyz"); return err })
	w.untilWithin(time.Minute, "the agent has settled", func() error {
		if got := w.resident("VmRSS"); got > residentBound {
			return fmt.Errorf("%.0f MiB are resident, of at most %d", got, residentBound)
		}
		return nil
	})
	t.Logf("at rest: %.0f MiB, %.0f while it was read", w.resident("VmRSS"), w.resident("VmHWM"))
	highest := 0.0
	for i := range 300 {
		w.apply(fmt.Sprintf("change-%d.yaml", i%10), policy(fmt.Sprintf("ns-%04d/change-%d", i%10, i), denyAll)+"---\n"+
			fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {namespace: ns-0001, name: come-%d, labels: {app: app-1}}\nspec: {nodeName: node-1}\nstatus: {podIP: 10.9.0.%d}\n", i, 1+i%250))
		time.Sleep(25 * time.Millisecond)
		highest = max(highest, w.resident("VmRSS"))
	}
	t.Logf("while it changed: %.0f MiB at most", highest)
	if highest > residentBound {
		t.Errorf("%.0f MiB were resident while the cluster changed, of at most %d", highest, residentBound)
	}
}

// resident reads one of the agent's figures of memory, in MiB.
func (w *world) resident(what string) (mib float64) {
	w.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/status", w.agent.PID()))
	w.must(err)
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if name, value, _ := strings.Cut(lines.Text(), ":"); name == what {
			_, err := fmt.Sscanf(strings.TrimSpace(value), "%f kB", &mib)
			w.must(err)
		}
	}
	if mib == 0 {
		w.Fatalf("the agent's status has no %s", what)
	}
	return mib / 1024
}

// manifestsOf writes a generated cluster as one List.
func manifestsOf(t *testing.T, o *policycache.Objects) string {
	t.Helper()
	var items []any
	for _, n := range o.Namespaces {
		items = append(items, &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: n.Labels}})
	}
	for _, p := range o.Pods {
		pod := &corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels},
			Spec:       corev1.PodSpec{NodeName: p.Node},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: p.IPs[0].String()},
		}
		for _, ip := range p.IPs {
			pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
		}
		for _, port := range p.Ports {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "c", Image: "i",
				Ports: []corev1.ContainerPort{{Name: port.Name, ContainerPort: int32(port.Port)}}})
		}
		items = append(items, pod)
	}
	for _, np := range o.Policies {
		items = append(items, &networkingv1.NetworkPolicy{TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}, ObjectMeta: np.ObjectMeta, Spec: np.Spec})
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
