//go:build apiserver

package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/bench/controlplane"
	"portcullis/policycache/kube"
)

// TestAgentOnAPIServer runs the agent, explain and matrix against a real API
// server, all in a network namespace of their own: the test runs itself again
// in one.
func TestAgentOnAPIServer(t *testing.T) {
	if !inside(t) {
		return
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	plane, err := controlplane.Start(filepath.Join("..", "..", ".bin"), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer plane.Close()
	kubeconfig := plane.Kubeconfig(controlplane.Admin)
	populate(t, kubeconfig)

	ctx, cancel := context.WithCancel(context.Background())
	var stderr lockedBuffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"agent", "--kubeconfig", kubeconfig, "--node", "n1", "--socket", filepath.Join(t.TempDir(), "agent.sock")}, strings.NewReader(""), io.Discard, &stderr)
	}()
	defer func() {
		if t.Failed() {
			t.Logf("the agent said:\n%s", stderr.String())
		}
	}()
	eventually(t, "the agent is ready", func() bool { return get("/readyz?verbose") != "" && strings.HasSuffix(get("/readyz"), "ok\n") })
	eventually(t, "the isolated pod is in the set, and no other", func() bool {
		set, err := netlink.IpsetList("portcullis-4")
		return err == nil && len(set.Entries) == 1 && set.Entries[0].IP.String() == "10.0.0.2"
	})
	answers := []struct{ args, want string }{
		{"explain --from shop/web --to shop/db --port 5432", "DENY"},
		{"explain --from db --to web --port 80 -n shop", "ALLOW"},
		{"matrix --port 5432 -n shop -o json", `"verdict":"deny"`},
	}
	for _, a := range answers {
		var out bytes.Buffer
		if code := run(ctx, strings.Fields(a.args+" --kubeconfig "+kubeconfig), strings.NewReader(""), &out, &stderr); code != 0 || !strings.Contains(out.String(), a.want) {
			t.Errorf("%s: exit code %d, %s", a.args, code, out.String())
		}
	}
	observeNobody(t, kubeconfig)

	plane.StopAPI()
	eventually(t, "the metrics say that the watch is broken", func() bool {
		return strings.Contains(get("/metrics"), `portcullis_watch_broken{resource="pods"} 1`)
	})
	if text := get("/readyz?verbose"); !strings.HasSuffix(text, "ok\n") || !strings.Contains(text, "the last known state is in force") {
		t.Errorf("/readyz?verbose without a server:\n%s", text)
	}
	cancel()
	select {
	case code := <-ended:
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the agent doesn't end")
	}
	rules, err := exec.Command("iptables-save", "-t", "mangle").CombinedOutput()
	if err != nil || !strings.Contains(string(rules), "NFQUEUE") {
		t.Errorf("the gate was left open: %v\n%s", err, rules)
	}
}

// inside runs the test again in a network namespace of its own, and is true there.
func inside(t *testing.T) bool {
	t.Helper()
	const inside = "PORTCULLIS_TEST_INSIDE"
	if os.Getenv(inside) != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// populate makes two pods in namespace shop, of which db is isolated.
func populate(t *testing.T, kubeconfig string) {
	t.Helper()
	c, err := kube.Connect(kube.Config{Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err = c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{})
	must(err)
	for name, ip := range map[string]string{"web": "10.0.0.1", "db": "10.0.0.2"} {
		p, err := c.CoreV1().Pods("shop").Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
			Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		}, metav1.CreateOptions{})
		must(err)
		p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}
		_, err = c.CoreV1().Pods("shop").UpdateStatus(ctx, p, metav1.UpdateOptions{})
		must(err)
	}
	_, err = c.NetworkingV1().NetworkPolicies("shop").Create(ctx, &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "db"},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}},
	}, metav1.CreateOptions{})
	must(err)
}

// observeNobody asks agents that aren't there, and one whose pod doesn't run.
func observeNobody(t *testing.T, kubeconfig string) {
	t.Helper()
	ask := func(want string) {
		t.Helper()
		for _, command := range []string{"observe", "observe -f", "top --once"} {
			stdout, stderr, code := runPure(strings.NewReader(""), append(strings.Fields(command), "--kubeconfig", kubeconfig)...)
			if code != 1 || stdout != "" || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("%s: exit code %d, %q, %q; want one line with %q", command, code, stdout, stderr, want)
			}
		}
	}
	ask("there is no agent's pod in namespace portcullis")
	c, err := kube.Connect(kube.Config{Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "portcullis"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.CoreV1().Pods("portcullis").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "portcullis-x", Labels: map[string]string{"app.kubernetes.io/name": "portcullis"}},
		Spec:       corev1.PodSpec{NodeName: "n7", Containers: []corev1.Container{{Name: "agent", Image: "i"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ask("node n7: its agent, pod portcullis/portcullis-x, doesn't run")
}

// get asks the agent's own pages, "" while there is no answer.
func get(path string) string {
	response, err := http.Get("http://127.0.0.1:9353" + path)
	if err != nil {
		return ""
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	return string(text)
}

// eventually waits until ok holds; the deadline is for hangs only.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// lockedBuffer is written by the agent while the test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
