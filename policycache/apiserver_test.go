//go:build apiserver

package policycache_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"portcullis/bench/controlplane"
	"portcullis/policycache"
	"portcullis/policycache/kube"
	"portcullis/verdict"
)

// follower is a watcher on a real API server, behind a forwarder that the test
// can cut, with what an agent makes of its states.
type follower struct {
	*testing.T
	plane   *controlplane.ControlPlane
	admin   *kube.Client
	watcher *kube.Watcher
	wire    *forwarder

	mu       sync.Mutex
	last     *policycache.Objects
	snapshot *verdict.Snapshot
}

// TestAPIServer tells one long story, since a control plane takes seconds to
// start: each chapter begins with the state that the one before left.
func TestAPIServer(t *testing.T) {
	dir := t.TempDir()
	plane, err := controlplane.Start(filepath.Join("..", ".bin"), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(plane.Close)
	f := &follower{T: t, plane: plane, wire: forward(t, strings.TrimPrefix(plane.Host(), "https://"))}
	f.admin = f.connect(plane.Kubeconfig(controlplane.Admin))
	agent := f.connect(f.rewired(plane.Kubeconfig(controlplane.Agent)))
	f.watcher = kube.NewWatcher(agent, slog.New(slog.NewTextHandler(io.Discard, nil)))
	f.wire.cut()
	f.run()
	for _, chapter := range []struct {
		name string
		tell func(*testing.T, *follower)
	}{
		{"the server isn't there at boot", noServerAtBoot},
		{"a right is missing", missingRight},
		{"objects come, change and go", objectsComeAndGo},
		{"modes come and go", modesComeAndGo},
		{"the server's defaults", serverDefaults},
		{"what policy doesn't see", heartbeats},
		{"changes missed while the server was away", missedChanges},
		{"a watch too old to go on from", tooOld},
		{"read once", readOnce},
	} {
		if !t.Run(chapter.name, func(t *testing.T) { chapter.tell(t, f) }) {
			return
		}
	}
}

func (f *follower) connect(kubeconfig string) *kube.Client {
	c, err := kube.Connect(kube.Config{Kubeconfig: kubeconfig, UserAgent: "portcullis-test"})
	f.must(err)
	return c
}

func (f *follower) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

// rewired copies a kubeconfig with the forwarder's address.
func (f *follower) rewired(kubeconfig string) string {
	content, err := os.ReadFile(kubeconfig)
	f.must(err)
	path := filepath.Join(f.TempDir(), "kubeconfig")
	f.must(os.WriteFile(path, bytes.ReplaceAll(content, []byte(f.plane.Host()), []byte("https://"+f.wire.addr())), 0o600))
	return path
}

// run starts the watcher and compiles what it applies.
func (f *follower) run() {
	ctx, cancel := context.WithCancel(context.Background())
	compiler := policycache.NewCompiler("", slog.New(slog.NewTextHandler(io.Discard, nil)))
	done := make(chan error, 1)
	go func() {
		done <- f.watcher.Run(ctx, func(o *policycache.Objects) {
			s := compiler.Compile(o)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.last, f.snapshot = o, s
		})
	}()
	f.Cleanup(func() { cancel(); <-done })
}

func (f *follower) now() (*policycache.Objects, *verdict.Snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last, f.snapshot
}

// soon waits until ok holds; the deadline is for hangs only.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// agrees waits until the watcher has the state that the server has, and then
// holds every verdict between its pods against the oracle.
func (f *follower) agrees(t *testing.T) {
	t.Helper()
	want, err := kube.Fetch(context.Background(), f.admin)
	if err != nil {
		t.Fatal(err)
	}
	soon(t, "the watched state is the server's", func() bool {
		o, _ := f.now()
		return o != nil && sameObjects(o, want)
	})
	o, s := f.now()
	addrs := []netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("192.168.0.1")}
	for _, p := range o.Pods {
		addrs = append(addrs, p.IPs...)
	}
	for _, src := range addrs {
		for _, dst := range addrs {
			for _, port := range []uint16{80, 5432, 8080} {
				flow := verdict.Flow{Src: src, Dst: dst, Proto: verdict.TCP, SrcPort: 40000, DstPort: port}
				d := s.Decide(&flow)
				if got, want := answerOf(&d), oracle(o, "", flow); got != want {
					t.Errorf("%s -> %s:%d: %s, want %s", src, dst, port, got, want)
				}
			}
		}
	}
}

// sameObjects compares states by what policy sees of them.
func sameObjects(a, b *policycache.Objects) bool {
	specs := func(o *policycache.Objects) map[string]networkingv1.NetworkPolicySpec {
		all := map[string]networkingv1.NetworkPolicySpec{}
		for key, p := range o.Policies {
			all[key] = p.Spec
		}
		return all
	}
	return reflect.DeepEqual(a.Pods, b.Pods) && reflect.DeepEqual(a.Namespaces, b.Namespaces) &&
		reflect.DeepEqual(a.Nodes, b.Nodes) && reflect.DeepEqual(specs(a), specs(b))
}

func (f *follower) verdict(t *testing.T, src, dst string, port uint16) string {
	t.Helper()
	_, s := f.now()
	d := s.Decide(&verdict.Flow{Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Proto: verdict.TCP, DstPort: port})
	return d.Verdict.String()
}

// noServerAtBoot: the watcher waits, says so, and is not loaded.
func noServerAtBoot(t *testing.T, f *follower) {
	soon(t, "every resource has an error", func() bool { return len(f.watcher.Status().Errors) == len(kube.Resources()) })
	if s := f.watcher.Status(); s.Loaded || !s.Heard["pods"].IsZero() {
		t.Errorf("without a server: %+v", s)
	}
	f.wire.join()
}

// missingRight: the server is there and forbids; the message says what is
// missing, and once the right is given the state is loaded without a restart.
func missingRight(t *testing.T, f *follower) {
	soon(t, "each resource is said to be forbidden", func() bool {
		errs := f.watcher.Status().Errors
		return len(errs) == len(kube.Resources()) && !slices.ContainsFunc(slices.Collect(maps.Values(errs)), func(text string) bool {
			return !strings.Contains(text, "no right to list and watch") || strings.Contains(text, "\n")
		})
	})
	ctx := context.Background()
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "portcullis"}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "namespaces", "nodes"}, Verbs: []string{"list", "watch"}},
	}}
	_, err := f.admin.RbacV1().ClusterRoles().Create(ctx, role, metav1.CreateOptions{})
	f.must(err)
	_, err = f.admin.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "portcullis"},
		RoleRef:    rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "portcullis"},
		Subjects:   []rbacv1.Subject{{Kind: "User", APIGroup: "rbac.authorization.k8s.io", Name: controlplane.Agent}},
	}, metav1.CreateOptions{})
	f.must(err)
	soon(t, "only the policies are still forbidden", func() bool {
		errs := f.watcher.Status().Errors
		return len(errs) == 1 && strings.Contains(errs["networkpolicies"], "networkpolicies")
	})
	if f.watcher.Status().Loaded {
		t.Error("loaded without the policies")
	}
	role.Rules = append(role.Rules, rbacv1.PolicyRule{
		APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: []string{"list", "watch"},
	})
	_, err = f.admin.RbacV1().ClusterRoles().Update(ctx, role, metav1.UpdateOptions{})
	f.must(err)
	soon(t, "the state is loaded and nothing is wrong", func() bool {
		s := f.watcher.Status()
		return s.Loaded && len(s.Errors) == 0
	})
}

// objectsComeAndGo: create, update, relabel, delete; the verdicts follow.
func objectsComeAndGo(t *testing.T, f *follower) {
	f.node("n1", "192.168.0.1")
	f.namespace("shop", map[string]string{"team": "red"})
	f.namespace("other", nil)
	f.pod("shop", "web", "10.0.0.1", map[string]string{"app": "web"})
	f.pod("shop", "db", "10.0.0.2", map[string]string{"app": "db"})
	f.pod("other", "stranger", "10.0.0.3", nil)
	f.agrees(t)
	f.expect(t, "allow", "10.0.0.3", "10.0.0.2", 5432)

	f.policy("shop", "db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]}]}`)
	f.agrees(t)
	f.expect(t, "deny", "10.0.0.3", "10.0.0.2", 5432)
	f.expect(t, "allow", "10.0.0.1", "10.0.0.2", 5432)
	f.expect(t, "allow", "192.168.0.1", "10.0.0.2", 5432) // its own node

	f.patch(t, "shop", "web", `{"metadata":{"labels":{"app":"former-web"}}}`)
	f.agrees(t)
	f.expect(t, "deny", "10.0.0.1", "10.0.0.2", 5432)

	f.policy("shop", "db", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}`)
	f.agrees(t)
	f.expect(t, "deny", "10.0.0.3", "10.0.0.2", 5432)
	f.namespace("other", map[string]string{"team": "blue"})
	f.agrees(t)
	f.expect(t, "allow", "10.0.0.3", "10.0.0.2", 5432)

	now := int64(0)
	ctx := context.Background()
	f.must(f.admin.CoreV1().Pods("other").Delete(ctx, "stranger", metav1.DeleteOptions{GracePeriodSeconds: &now}))
	f.agrees(t)
	f.expect(t, "deny", "10.0.0.3", "10.0.0.2", 5432) // an address of nobody's now
	f.must(f.admin.NetworkingV1().NetworkPolicies("shop").Delete(ctx, "db", metav1.DeleteOptions{}))
	f.agrees(t)
	f.expect(t, "allow", "10.0.0.3", "10.0.0.2", 5432)
}

// modesComeAndGo: annotations of namespaces and nodes; the verdicts follow.
func modesComeAndGo(t *testing.T, f *follower) {
	ctx := context.Background()
	annotate := func(namespace, mode string) {
		patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"portcullis.dev/mode":%s}}}`, mode)
		var err error
		if namespace != "" {
			_, err = f.admin.CoreV1().Namespaces().Patch(ctx, namespace, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
		} else {
			_, err = f.admin.CoreV1().Nodes().Patch(ctx, "n1", types.StrategicMergePatchType, patch, metav1.PatchOptions{})
		}
		f.must(err)
	}
	follows := func(want string) {
		t.Helper()
		soon(t, "the verdict is "+want, func() bool { return f.verdict(t, "10.0.0.1", "10.0.0.2", 5432) == want })
	}
	f.policy("shop", "closed", `{podSelector: {}, policyTypes: [Ingress]}`)
	follows("deny")
	annotate("shop", `"audit-only"`)
	follows("would-deny")
	annotate("shop", `null`)
	follows("deny")
	annotate("", `"audit-only"`)
	follows("would-deny")
	annotate("shop", `"enforce"`)
	follows("deny")
	annotate("", `null`)
	annotate("shop", `null`)
	f.must(f.admin.NetworkingV1().NetworkPolicies("shop").Delete(ctx, "closed", metav1.DeleteOptions{}))
	follows("allow")
}

// serverDefaults: a policy that leaves out what the server fills in.
func serverDefaults(t *testing.T, f *follower) {
	f.policy("shop", "defaults", `{podSelector: {}, egress: [{ports: [{port: 80}]}]}`)
	f.agrees(t)
	f.expect(t, "deny", "203.0.113.9", "10.0.0.2", 80) // Ingress is always meant
	f.expect(t, "allow", "10.0.0.2", "203.0.113.9", 80)
	f.expect(t, "deny", "10.0.0.2", "203.0.113.9", 81)
	o, _ := f.now()
	spec := o.Policies["shop/defaults"].Spec
	if len(spec.PolicyTypes) != 2 || *spec.Egress[0].Ports[0].Protocol != corev1.ProtocolTCP {
		t.Errorf("the server didn't default: %+v", spec)
	}
}

// heartbeats: what policy can't see makes no new state.
func heartbeats(t *testing.T, f *follower) {
	before := f.watcher.Status().Applied
	for i := range 20 {
		f.patch(t, "shop", "web", fmt.Sprintf(`{"metadata":{"annotations":{"beat":"%d"}}}`, i))
		_, err := f.admin.CoreV1().Nodes().Patch(context.Background(), "n1", types.StrategicMergePatchType,
			fmt.Appendf(nil, `{"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":%q}]}}`,
				time.Unix(int64(i), 0).UTC().Format(time.RFC3339)), metav1.PatchOptions{}, "status")
		f.must(err)
	}
	f.patch(t, "shop", "web", `{"metadata":{"labels":{"app":"web"}}}`)
	f.agrees(t)
	if n := f.watcher.Status().Applied - before; n != 1 {
		t.Errorf("40 heartbeats and a label made %d new states, want 1", n)
	}
}

// missedChanges: the last known state stays in force while the server is away;
// afterwards deletions that were missed are noticed.
func missedChanges(t *testing.T, f *follower) {
	f.pod("shop", "short-lived", "10.0.0.4", nil)
	f.agrees(t)
	f.wire.cut()
	soon(t, "the loss is noticed", func() bool { return len(f.watcher.Status().Errors) > 0 })
	now := int64(0)
	f.must(f.admin.CoreV1().Pods("shop").Delete(context.Background(), "short-lived", metav1.DeleteOptions{GracePeriodSeconds: &now}))
	f.must(f.admin.NetworkingV1().NetworkPolicies("shop").Delete(context.Background(), "defaults", metav1.DeleteOptions{}))
	f.pod("shop", "late", "10.0.0.5", nil)
	if o, _ := f.now(); o.Pods["shop/short-lived"] == nil || o.Policies["shop/defaults"] == nil {
		t.Error("the state didn't stay while the server was away")
	}
	f.expect(t, "deny", "203.0.113.9", "10.0.0.2", 80)
	f.wire.join()
	f.agrees(t)
	f.expect(t, "allow", "203.0.113.9", "10.0.0.2", 80)
	soon(t, "nothing is wrong any more", func() bool { return len(f.watcher.Status().Errors) == 0 })
}

// tooOld: the server restarts, so that its watch cache doesn't reach back to
// where the watcher stopped ("too old resource version").
func tooOld(t *testing.T, f *follower) {
	f.wire.cut()
	for i := range 5 {
		f.pod("shop", fmt.Sprint("more-", i), fmt.Sprint("10.0.1.", i+1), nil)
	}
	f.plane.StopAPI()
	f.must(f.plane.StartAPI())
	f.policy("shop", "late", `{podSelector: {}, policyTypes: [Ingress]}`)
	f.wire.join()
	f.agrees(t)
	f.expect(t, "deny", "203.0.113.9", "10.0.1.5", 80)
}

// readOnce: what explain and matrix do.
func readOnce(t *testing.T, f *follower) {
	o, err := kube.Fetch(context.Background(), f.admin)
	f.must(err)
	if len(o.Pods) < 8 || o.Namespaces["shop"].Labels["kubernetes.io/metadata.name"] != "shop" {
		t.Errorf("%d pods, namespace %+v", len(o.Pods), o.Namespaces["shop"])
	}
	f.wire.cut()
	defer f.wire.join()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err = kube.Fetch(ctx, f.connect(f.rewired(f.plane.Kubeconfig(controlplane.Admin))))
	if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), f.wire.addr()) {
		t.Errorf("without a server: %v", err)
	}
}

func (f *follower) expect(t *testing.T, want, src, dst string, port uint16) {
	t.Helper()
	if got := f.verdict(t, src, dst, port); got != want {
		t.Errorf("%s -> %s:%d: %s, want %s", src, dst, port, got, want)
	}
}

func (f *follower) node(name, ip string) {
	ctx := context.Background()
	n, err := f.admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	f.must(err)
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}
	_, err = f.admin.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
	f.must(err)
}

// namespace makes a namespace, or gives one that is there other labels.
func (f *follower) namespace(name string, labels map[string]string) {
	ctx := context.Background()
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	_, err := f.admin.CoreV1().Namespaces().Create(ctx, n, metav1.CreateOptions{})
	if err != nil {
		_, err = f.admin.CoreV1().Namespaces().Update(ctx, n, metav1.UpdateOptions{})
	}
	f.must(err)
}

func (f *follower) pod(namespace, name, ip string, labels map[string]string) {
	ctx := context.Background()
	p, err := f.admin.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}, metav1.CreateOptions{})
	f.must(err)
	p.Status.Phase, p.Status.PodIP, p.Status.PodIPs = corev1.PodRunning, ip, []corev1.PodIP{{IP: ip}}
	_, err = f.admin.CoreV1().Pods(namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{})
	f.must(err)
}

func (f *follower) patch(t *testing.T, namespace, name, patch string) {
	t.Helper()
	_, err := f.admin.CoreV1().Pods(namespace).Patch(context.Background(), name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
	f.must(err)
}

// policy makes a policy from its spec, or replaces it.
func (f *follower) policy(namespace, name, spec string) {
	ctx := context.Background()
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	f.must(yaml.UnmarshalStrict([]byte(spec), &np.Spec))
	policies := f.admin.NetworkingV1().NetworkPolicies(namespace)
	if _, err := policies.Create(ctx, np, metav1.CreateOptions{}); err != nil {
		old, err := policies.Get(ctx, name, metav1.GetOptions{})
		f.must(err)
		old.Spec = np.Spec
		_, err = policies.Update(ctx, old, metav1.UpdateOptions{})
		f.must(err)
	}
}

// forwarder passes connections on to the API server until it is cut.
type forwarder struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	open  bool
	conns map[net.Conn]bool
}

func forward(t *testing.T, target string) *forwarder {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{listener: l, target: target, open: true, conns: map[net.Conn]bool{}}
	t.Cleanup(func() { l.Close(); f.cut() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f.pass(c)
		}
	}()
	return f
}

func (f *forwarder) addr() string { return f.listener.Addr().String() }

func (f *forwarder) pass(c net.Conn) {
	defer c.Close()
	server, err := net.Dial("tcp", f.target)
	if err != nil {
		return
	}
	defer server.Close()
	f.mu.Lock()
	if !f.open {
		f.mu.Unlock()
		return
	}
	f.conns[c], f.conns[server] = true, true
	f.mu.Unlock()
	go func() { io.Copy(server, c); server.Close() }()
	io.Copy(c, server)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
	delete(f.conns, server)
}

// cut closes what is open and lets nothing through until join.
func (f *forwarder) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = false
	for c := range f.conns {
		c.Close()
	}
}

func (f *forwarder) join() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = true
}
