// Package deploy holds that the manifests that users apply are what the kustomize
// directories give, and that they ask for no more than is needed.
package deploy

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"portcullis/policycache/kube"
)

var update = flag.Bool("update", false, "write the manifests anew")

// generated names, for each file that users apply, the directory that it is made of.
var generated = map[string]string{"portcullis.yaml": "kustomize/base", "uninstall.yaml": "kustomize/overlays/uninstall"}

// build runs kustomize, at the version that go.mod names.
func build(t *testing.T, dir string) []byte {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("go", "tool", "kustomize", "build", dir)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("kustomize build %s: %v\n%s", dir, err, stderr.String())
	}
	return stdout.Bytes()
}

func TestManifestsAreFresh(t *testing.T) {
	for file, dir := range generated {
		want := build(t, dir)
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s isn't what %s gives (%v): run make manifests", file, dir, err)
		}
	}
}

// object finds the one object of a kind and reads it strictly: a misspelt field is
// an error.
func object(t *testing.T, manifest []byte, kind string, into any) {
	t.Helper()
	found := 0
	for doc := range strings.SplitSeq(string(manifest), "\n---\n") {
		if !strings.Contains("\n"+doc, "\nkind: "+kind+"\n") {
			continue
		}
		found++
		if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
	}
	if found != 1 {
		t.Fatalf("%d objects of kind %s, want one", found, kind)
	}
}

func daemonSet(t *testing.T, dir string) *appsv1.DaemonSet {
	t.Helper()
	ds := new(appsv1.DaemonSet)
	object(t, build(t, dir), "DaemonSet", ds)
	return ds
}

// TestRightsAreThoseNeeded: the cluster's objects that the agent may read are those
// that it watches, and of the node it gets two capabilities and nothing else. That
// it needs both is shown on a real cluster, by make cluster-test.
func TestRightsAreThoseNeeded(t *testing.T) {
	var role rbacv1.ClusterRole
	object(t, build(t, "kustomize/base"), "ClusterRole", &role)
	var resources []string
	for _, rule := range role.Rules {
		resources = append(resources, rule.Resources...)
		if !slices.Equal(rule.Verbs, []string{"list", "watch"}) {
			t.Errorf("verbs on %v are %v", rule.Resources, rule.Verbs)
		}
	}
	if want := slices.Sorted(slices.Values(kube.Resources())); !slices.Equal(slices.Sorted(slices.Values(resources)), want) {
		t.Errorf("the role is about %v, the agent watches %v", resources, want)
	}
	for _, dir := range generated {
		ds := daemonSet(t, dir)
		for _, c := range slices.Concat(ds.Spec.Template.Spec.InitContainers, ds.Spec.Template.Spec.Containers) {
			want := &corev1.SecurityContext{
				Privileged: new(false), AllowPrivilegeEscalation: new(false), ReadOnlyRootFilesystem: new(true),
				Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_ADMIN", "NET_RAW"}},
			}
			if !reflect.DeepEqual(c.SecurityContext, want) {
				t.Errorf("%s: container %s: %+v", dir, c.Name, c.SecurityContext)
			}
		}
		pod := ds.Spec.Template.Spec
		if pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || pod.HostPID || pod.HostIPC || !pod.HostNetwork {
			t.Errorf("%s: %+v, hostPID %t, hostIPC %t, hostNetwork %t", dir, pod.SecurityContext, pod.HostPID, pod.HostIPC, pod.HostNetwork)
		}
	}
}

// TestDaemonSet holds what operators rely on.
func TestDaemonSet(t *testing.T) {
	ds := daemonSet(t, "kustomize/base")
	pod := ds.Spec.Template.Spec
	agent := pod.Containers[0]
	if pod.PriorityClassName != "system-node-critical" || *pod.TerminationGracePeriodSeconds == 0 ||
		!reflect.DeepEqual(pod.Tolerations, []corev1.Toleration{{Operator: corev1.TolerationOpExists}}) {
		t.Errorf("priority %q, grace %d s, tolerations %v", pod.PriorityClassName, *pod.TerminationGracePeriodSeconds, pod.Tolerations)
	}
	if ds.Spec.UpdateStrategy.Type != appsv1.RollingUpdateDaemonSetStrategyType || agent.Resources.Requests.Cpu().IsZero() || agent.Resources.Requests.Memory().IsZero() {
		t.Errorf("update %+v, requests %v", ds.Spec.UpdateStrategy, agent.Resources.Requests)
	}
	if u := ds.Spec.UpdateStrategy.RollingUpdate; u.MaxSurge.String() != "1" || u.MaxUnavailable.String() != "0" || !slices.Contains(agent.Args, "--standby") {
		t.Errorf("rolling update %+v, arguments %q: the old agent is to hand over to the new one", u, agent.Args)
	}
	if p := agent.StartupProbe; p == nil || p.Exec == nil || !slices.Equal(p.Exec.Command, []string{"/usr/local/bin/portcullis", "probe"}) {
		t.Errorf("startup probe %+v: only the pod's own agent's answer is to count", p)
	}
	for name, probe := range map[string]*corev1.Probe{"liveness": agent.LivenessProbe, "readiness": agent.ReadinessProbe} {
		if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Host != "127.0.0.1" {
			t.Errorf("%s probe: %+v; the agent answers on loopback", name, probe)
		}
	}
	if env := agent.Env; len(env) != 2 || env[0].Name != "NODE_NAME" || env[0].ValueFrom.FieldRef.FieldPath != "spec.nodeName" ||
		env[1].Name != "POD_UID" || env[1].ValueFrom.FieldRef.FieldPath != "metadata.uid" {
		t.Errorf("environment: %+v", env)
	}
	mounts := map[string]bool{}
	for _, m := range agent.VolumeMounts {
		mounts[m.MountPath] = m.ReadOnly
	}
	if want := map[string]bool{"/run/xtables.lock": false, "/var/lib/cni/results": true, "/var/log/portcullis": false, "/run/portcullis": false, "/host/proc/sys/net": false}; !reflect.DeepEqual(mounts, want) {
		t.Errorf("mounts (true: read-only) %v, want %v", mounts, want)
	}
	terms := pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if got := terms[0].MatchExpressions[1].Values; !slices.Equal(got, []string{"amd64", "arm64"}) {
		t.Errorf("architectures %v", got)
	}
}

// TestOverlays: an overlay differs from the base by what it is for alone.
func TestOverlays(t *testing.T) {
	base := daemonSet(t, "kustomize/base")
	for dir, arg := range map[string]string{"fail-open": "--fail-open", "legacy-iptables": "--iptables-backend=legacy", "events": "--events"} {
		want := base.DeepCopy()
		want.Spec.Template.Spec.Containers[0].Args = append(want.Spec.Template.Spec.Containers[0].Args, arg)
		if got := daemonSet(t, "kustomize/overlays/"+dir); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is\n%+v\nwant\n%+v", dir, got, want)
		}
	}
}

// TestUninstallReplacesTheAgent: it is the same DaemonSet, with the same image, so
// that a node's agent has ended before its cleanup begins.
func TestUninstallReplacesTheAgent(t *testing.T) {
	base, got := daemonSet(t, "kustomize/base"), daemonSet(t, "kustomize/overlays/uninstall")
	if got.Name != base.Name || got.Namespace != base.Namespace || !reflect.DeepEqual(got.Spec.Selector, base.Spec.Selector) {
		t.Errorf("it is another DaemonSet: %s/%s %v", got.Namespace, got.Name, got.Spec.Selector)
	}
	// Beside a running agent cleanup refuses, and would never become ready.
	if u := got.Spec.UpdateStrategy.RollingUpdate; u.MaxSurge.String() != "0" || u.MaxUnavailable.String() != "100%" {
		t.Errorf("rolling update %+v", u)
	}
	image := base.Spec.Template.Spec.Containers[0].Image
	first, last := got.Spec.Template.Spec.InitContainers[0], got.Spec.Template.Spec.Containers[0]
	if first.Image != image || last.Image != image || first.Args[0] != "cleanup" || !slices.Equal(last.Args, []string{"cleanup", "--hold"}) {
		t.Errorf("it runs %s %v, then %s %v; the agent's image is %s", first.Image, first.Args, last.Image, last.Args, image)
	}
}

// TestEventsMayBeWritten: the component gives one right more, and no other.
func TestEventsMayBeWritten(t *testing.T) {
	text, err := os.ReadFile("kustomize/components/events/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var role rbacv1.ClusterRole
	object(t, text, "ClusterRole", &role)
	want := []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}}}
	if !reflect.DeepEqual(role.Rules, want) {
		t.Errorf("the component gives %+v", role.Rules)
	}
}
