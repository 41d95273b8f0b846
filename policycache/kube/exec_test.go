package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
)

// agentsPod is a pod of the agents, whose container runs, ends or waits.
func agentsPod(node, name, state string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "portcullis", Name: name, Labels: map[string]string{"app.kubernetes.io/name": "portcullis"}},
		Spec: corev1.PodSpec{NodeName: node}}
	s := corev1.ContainerStatus{Name: agentContainer}
	if state != "waits" {
		s.State.Running = &corev1.ContainerStateRunning{}
	}
	if state == "ends" {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
		p.Finalizers = []string{"x/y"} // the fake server wants one then
	}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{s}
	return p
}

// A node's agents are those that can be asked; where none can, that is told of.
func TestAgents(t *testing.T) {
	other := agentsPod("n1", "other", "runs")
	other.Labels = nil
	objects := []runtime.Object{other, agentsPod("n2", "b", "runs"), agentsPod("n1", "old", "ends"), agentsPod("n1", "new", "runs"),
		agentsPod("n3", "c", "waits"), agentsPod("n2", "a", "waits"), agentsPod("n4", "e", "runs"), agentsPod("n4", "d", "runs")}
	c := &Client{Interface: fake.NewClientset(objects...)}
	all, err := c.Agents(t.Context(), "portcullis")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range all {
		got = append(got, fmt.Sprint(p.Node, "/", p.Name, "/", p.Running))
	}
	if want := "n1/new/true n2/b/true n3/c/false n4/d/true n4/e/true"; strings.Join(got, " ") != want {
		t.Errorf("got %s, want %s", strings.Join(got, " "), want)
	}
	if all, err := c.Agents(t.Context(), "elsewhere"); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}
