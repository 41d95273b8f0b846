package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// born is the creation time of all objects, so that manifests of the same lab
// are the same bytes.
var born = metav1.NewTime(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))

// Manifests writes the cluster as the API server would tell it into a
// directory: lab-namespaces.yaml, lab-nodes.yaml and lab-pods.yaml. Each file
// is replaced at once, so that a watcher never reads half of one; other files
// are left alone.
func (l *Lab) Manifests(dir string) error {
	l.mu.Lock()
	var pods, namespaces []any
	named := map[string]bool{}
	for _, who := range l.order {
		if p := l.members[who].pod; p != nil {
			pods = append(pods, podObject(p))
			named[p.Namespace] = true
		}
	}
	for name := range l.namespaces {
		named[name] = true
	}
	for name := range named {
		namespaces = append(namespaces, namespaceObject(name, l.namespaces[name]))
	}
	l.mu.Unlock()
	slices.SortFunc(namespaces, func(a, b any) int {
		return strings.Compare(a.(*corev1.Namespace).Name, b.(*corev1.Namespace).Name)
	})
	for name, objects := range map[string][]any{
		"lab-namespaces.yaml": namespaces, "lab-nodes.yaml": {nodeObject()}, "lab-pods.yaml": pods,
	} {
		if err := writeObjects(filepath.Join(dir, name), objects); err != nil {
			return err
		}
	}
	return nil
}

func writeObjects(path string, objects []any) error {
	var text strings.Builder
	for _, o := range objects {
		b, err := yaml.Marshal(o)
		if err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		text.WriteString("---\n")
		text.Write(b)
	}
	return WriteFile(path, text.String())
}

// WriteFile puts a manifest in place by renaming, so that nobody reads half of
// it.
func WriteFile(path, text string) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp")
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func namespaceObject(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels, CreationTimestamp: born},
	}
}

func nodeObject() *corev1.Node {
	n := &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: NodeName, CreationTimestamp: born},
	}
	for _, ip := range NodeIPs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip.String()})
	}
	return n
}

func podObject(p *PodSpec) *corev1.Pod {
	pod := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, CreationTimestamp: born,
			UID: types.UID(p.Namespace + "-" + p.Name),
		},
		Spec: corev1.PodSpec{
			NodeName:   NodeName,
			Containers: []corev1.Container{{Name: "main", Image: "lab"}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, HostIP: NodeIPs[0].String(), PodIP: p.IPs[0].String()},
	}
	for _, ip := range NodeIPs {
		pod.Status.HostIPs = append(pod.Status.HostIPs, corev1.HostIP{IP: ip.String()})
	}
	for _, ip := range p.IPs {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	main := &pod.Spec.Containers[0]
	for _, port := range p.Ports {
		main.Ports = append(main.Ports, corev1.ContainerPort{
			Name: port.Name, Protocol: corev1.Protocol(port.Proto), ContainerPort: int32(port.Port),
		})
	}
	return pod
}
