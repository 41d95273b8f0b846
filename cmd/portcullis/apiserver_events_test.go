//go:build apiserver

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"portcullis/bench/controlplane"
	"portcullis/policycache/kube"
)

// TestEventsOnAPIServer has a real agent deny real connections, first without the
// right to write events and then with that of the kustomize component, and asks
// kubectl as a developer would.
func TestEventsOnAPIServer(t *testing.T) {
	if !inside(t) {
		return
	}
	shell(t, "ip link set lo up; ip addr add 10.0.0.254/32 dev lo; echo 1 > /proc/sys/net/ipv4/ip_forward")
	web, _ := eventPod(t, "web", "10.0.0.1"), eventPod(t, "db", "10.0.0.2")
	plane, err := controlplane.Start(filepath.Join("..", "..", ".bin"), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer plane.Close()
	admin := plane.Kubeconfig(controlplane.Admin)
	populate(t, admin)
	grant(t, admin, "../../deploy/kustomize/base/rbac.yaml")

	ctx, cancel := context.WithCancel(context.Background())
	var stderr lockedBuffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"agent", "--kubeconfig", plane.Kubeconfig(controlplane.Agent), "--node", "n1", "--events", "--decision-log-window", "1h"}, strings.NewReader(""), io.Discard, &stderr)
	}()
	defer func() {
		cancel()
		<-ended
		if t.Failed() {
			t.Logf("the agent said:\n%s", stderr.String())
		}
	}()
	eventually(t, "the agent is ready", func() bool { return strings.HasSuffix(get("/readyz"), "ok\n") })
	connect := func() {
		// Bash gives up after a second, without a second SYN having been a connection.
		_ = exec.Command("nsenter", "-t", fmt.Sprint(web), "-n", "timeout", "1", "bash", "-c", "echo > /dev/tcp/10.0.0.2/5432").Run()
	}
	connect()
	const missing = "may not create and patch events: kustomize/components/events"
	eventually(t, "the right is missing", func() bool { return strings.Contains(get("/readyz?verbose"), missing) })
	connect()
	eventually(t, "the second event was refused", func() bool {
		return strings.Contains(get("/metrics"), `portcullis_events_total{result="refused"} 2`)
	})
	if n := strings.Count(stderr.String(), missing); n != 1 {
		t.Errorf("the missing right was told %d times", n)
	}

	grant(t, admin, "../../deploy/kustomize/components/events/rbac.yaml")
	time.Sleep(time.Second) // the server's own cache of rights
	for range 3 {
		connect()
	}
	var described []byte
	eventually(t, "kubectl describe shows the denials", func() bool {
		described, err = exec.Command(filepath.Join("..", "..", ".bin", "kubectl"), "--kubeconfig", admin, "-n", "shop", "describe", "pod", "web").CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl, which make test-api builds: %v\n%s", err, described)
		}
		return strings.Contains(string(described), "denied by shop/db")
	})
	told := string(described)[strings.Index(string(described), "Events:"):]
	t.Logf("%s", told)
	if !strings.Contains(told, "Warning  ConnectionDenied") || !strings.Contains(told, "to shop/db:5432 denied by shop/db") {
		t.Errorf("kubectl describe:\n%s", told)
	}
	if text := get("/readyz?verbose"); strings.Contains(text, missing) {
		t.Errorf("the right is there, and yet:\n%s", text)
	}
}

// shell runs commands.
func shell(t *testing.T, script string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// eventPod makes a network namespace that routes to this one, and gives the process
// that holds it.
func eventPod(t *testing.T, name, ip string) (pid int) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	pid = cmd.Process.Pid
	in := fmt.Sprintf("nsenter -t %d -n ip ", pid)
	shell(t, fmt.Sprintf("ip link add %s type veth peer name eth0 netns %d; ip link set %s up; ip route add %s dev %s;", name, pid, name, ip, name)+
		in+"link set lo up;"+in+"addr add "+ip+"/32 dev eth0;"+in+"link set eth0 up;"+in+"route add 10.0.0.254 dev eth0;"+in+"route add default via 10.0.0.254")
	return pid
}

// grant gives the agent's user the rights of a manifest's ClusterRole.
func grant(t *testing.T, kubeconfig, manifest string) {
	t.Helper()
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	client, err := kube.Connect(kube.Config{Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		var role rbacv1.ClusterRole
		if !strings.Contains(doc, "kind: ClusterRole\n") || strings.Contains(doc, "\nroleRef:") {
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(doc), &role); err != nil {
			t.Fatal(err)
		}
		ctx := context.Background()
		if _, err := client.RbacV1().ClusterRoles().Create(ctx, &role, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: role.Name},
			RoleRef:    rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: role.Name},
			Subjects:   []rbacv1.Subject{{Kind: "User", APIGroup: "rbac.authorization.k8s.io", Name: controlplane.Agent}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
}
