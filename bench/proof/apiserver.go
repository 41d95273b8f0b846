package proof

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"portcullis/bench/controlplane"
	"portcullis/bench/lab"
)

// apiName is the agent that watches an API server, in its own world.
const apiName = "portcullis-api"

// runControlPlane is the role that runs etcd and an API server, on the loopback of its
// network namespace, until a SIGTERM.
func runControlPlane(f *flag.FlagSet, args []string) error {
	bin := f.String("bin", "", "where etcd and kube-apiserver are")
	dir := f.String("dir", "", "their state")
	if err := f.Parse(args); err != nil {
		return err
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	plane, err := controlplane.Start(*bin, *dir)
	if err != nil {
		return err
	}
	defer plane.Close()
	fmt.Println(serving)
	<-end
	return nil
}

// connectAPI makes a client; its connections start in the network namespace at the
// path, or in the process' own.
func connectAPI(kubeconfig, netns string) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 10_000, 10_000
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	if netns != "" {
		around := lab.Around()
		if err := around.Adopt(lab.Node, netns); err != nil {
			return nil, err
		}
		config.Dial = func(_ context.Context, network, addr string) (c net.Conn, err error) {
			err = around.Do(lab.Node, func() (err error) {
				c, err = net.DialTimeout(network, addr, startLimit)
				return err
			})
			return c, err
		}
	}
	return kubernetes.NewForConfig(config)
}

// makers is how many requests go to the API server at once while it is filled.
const makers = 16

// runPopulate is the role that makes a cluster's objects, and keeps those that are
// there already.
func runPopulate(f *flag.FlagSet, args []string) error {
	kubeconfig := f.String("kubeconfig", "", "of the API server")
	pairs := f.Int("pairs", 1, "of measured pods")
	var c clusterSpec
	f.IntVar(&c.onPod, "on-pod", 1, "policies on the measured pods")
	f.IntVar(&c.elsewhere, "elsewhere", 0, "other policies")
	f.IntVar(&c.pods, "pods", 0, "other pods")
	if err := f.Parse(args); err != nil {
		return err
	}
	client, err := connectAPI(*kubeconfig, "")
	if err != nil {
		return err
	}
	namespaces, pods, policies := c.objects(*pairs)
	policies = append(policies, changePolicy("open", openLabel))
	ctx := context.Background()
	for i := range *pairs {
		pods = append(pods, serverManifest(i, nil))
	}
	if err := makeAll(namespaces, func(n *corev1.Namespace) error {
		_, err := client.CoreV1().Namespaces().Create(ctx, n, metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	if err := makeAll(pods, func(p *corev1.Pod) error {
		made, err := client.CoreV1().Pods(p.Namespace).Create(ctx, p, metav1.CreateOptions{})
		if err == nil {
			made.Status = p.Status
			_, err = client.CoreV1().Pods(p.Namespace).UpdateStatus(ctx, made, metav1.UpdateOptions{})
		}
		return err
	}); err != nil {
		return err
	}
	return makeAll(policies, func(np *networkingv1.NetworkPolicy) error {
		_, err := client.NetworkingV1().NetworkPolicies(np.Namespace).Create(ctx, np, metav1.CreateOptions{})
		return err
	})
}

// makeAll makes objects, several at once, and gives the first error. One that exists is
// none.
func makeAll[T any](objects []T, make func(T) error) (err error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	for part := range slices.Chunk(objects, len(objects)/makers+1) {
		all.Go(func() {
			for _, o := range part {
				if e := make(o); e != nil && !apierrors.IsAlreadyExists(e) {
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						err = fmt.Errorf("populate: %w", e)
					}
					return
				}
			}
		})
	}
	all.Wait()
	return err
}

// apiChanges makes changes by an API server.
type apiChanges struct{ client kubernetes.Interface }

func (a apiChanges) policyComes(server int) error {
	np := changePolicy("react-"+serverName(server), labels("pod", serverName(server)))
	_, err := a.client.NetworkingV1().NetworkPolicies(measured).Create(context.Background(), np, metav1.CreateOptions{})
	return err
}

func (a apiChanges) policyGoes(server int) error {
	return a.client.NetworkingV1().NetworkPolicies(measured).Delete(context.Background(), "react-"+serverName(server), metav1.DeleteOptions{})
}

func (a apiChanges) relabel(server int, extra labelMap) error {
	change := map[string]any{}
	for key := range openLabel {
		change[key] = nil
	}
	for key, value := range extra {
		change[key] = value
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": change}})
	if err != nil {
		return err
	}
	_, err = a.client.CoreV1().Pods(measured).Patch(context.Background(), serverName(server), types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

// plane is a control plane that runs in a world's node.
type plane struct {
	process    *lab.Process
	kubeconfig string
}

// startPlane runs etcd and an API server in the node's namespace; nothing outside can
// reach them.
func (w *world) startPlane(ctx context.Context, bin string) (plane, error) {
	dir := w.dir + ".control-plane"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return plane{}, err
	}
	p, err := w.start(ctx, lab.Node, nil, "control-plane", "-bin", bin, "-dir", dir)
	return plane{p, filepath.Join(dir, controlplane.Admin+".kubeconfig")}, err
}

// populate makes the objects of the world's cluster.
func (w *world) populate(ctx context.Context, c plane) error {
	_, err := w.lab.Command(ctx, lab.Node, w.command(nil, "populate", "-kubeconfig", c.kubeconfig, "-pairs", fmt.Sprint(w.pairs),
		"-on-pod", fmt.Sprint(w.cluster.onPod), "-elsewhere", fmt.Sprint(w.cluster.elsewhere), "-pods", fmt.Sprint(w.cluster.pods))...)
	return err
}

// measureAPI times changes that come fast by way of an API server, at each size of
// cluster, in a world that is made for it.
func (r *run) measureAPI(ctx context.Context, dir string) (err error) {
	p := r.Params
	if !p.wantsAPI() || p.Reactions < 1 {
		return nil
	}
	v := variant{name: apiName, kind: noFilter, about: "Portcullis, the cluster's state from an API server"}
	own := filepath.Join(dir, v.name)
	if err := os.Mkdir(own, 0o755); err != nil {
		return err
	}
	w, err := newWorld(ctx, v, p, len(r.worlds), r.programs.Agent, r.programs.Self, own)
	if err != nil {
		return err
	}
	r.worlds = append(r.worlds, w)
	c, err := w.startPlane(ctx, r.programs.Plane)
	if err != nil {
		return fmt.Errorf("%s: %w", v.name, err)
	}
	for _, n := range p.Policies {
		start := time.Now()
		w.cluster = p.spread(n)
		if err := w.populate(ctx, c); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
		filled := time.Since(start).Round(time.Millisecond)
		if err := w.measureAPIAt(ctx, r, c, n); err != nil {
			return fmt.Errorf("%s with %d policies: %w", v.name, n, err)
		}
		r.say("%-24s %d policies, the server filled in %s", v.name, n, filled)
	}
	return c.process.Signal(terminated)
}

// measureAPIAt runs an agent on what the server has now.
func (w *world) measureAPIAt(ctx context.Context, r *run, c plane, policies int) error {
	w.source = []string{"--kubeconfig", c.kubeconfig}
	if err := w.startAgent(ctx, r.programs.Agent); err != nil {
		return err
	}
	name := fmt.Sprint(apiName, "-", policies)
	if err := r.react(ctx, w, name, "-kubeconfig", c.kubeconfig, "-netns", filepath.Join("/run/netns", w.lab.Namespace(lab.Node))); err != nil {
		return err
	}
	if err := errors.Join(w.gate.Signal(terminated), w.gate.Signal(syscall.SIGCONT)); err != nil {
		return err
	}
	return w.gate.Wait(startLimit)
}
