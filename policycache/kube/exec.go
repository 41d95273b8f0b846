package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

// agentLabel is how the manifests label the agents' pods, and agentContainer is
// what they call the agent.
const (
	agentLabel     = "app.kubernetes.io/name=portcullis"
	agentContainer = "agent"
)

// AgentPod is a pod that an agent runs in.
type AgentPod struct {
	Namespace, Name, Node string
	UID                   types.UID
	// Running tells that its container can be talked to.
	Running bool
}

// Agents lists the agents' pods of a namespace, by their nodes. One that doesn't run, or
// is about to end, is left out where another one runs on its node.
func (c *Client) Agents(ctx context.Context, namespace string) ([]AgentPod, error) {
	list, err := c.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: agentLabel})
	if err != nil {
		return nil, fmt.Errorf("can't list the agents' pods: %w", err)
	}
	var all []AgentPod
	for i := range list.Items {
		p := &list.Items[i]
		all = append(all, AgentPod{p.Namespace, p.Name, p.Spec.NodeName, p.UID, agentRuns(p)})
	}
	runs := map[string]bool{}
	for _, p := range all {
		runs[p.Node] = runs[p.Node] || p.Running
	}
	all = slices.DeleteFunc(all, func(p AgentPod) bool { return !p.Running && runs[p.Node] })
	slices.SortFunc(all, func(a, b AgentPod) int { return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Name, b.Name)) })
	return all, nil
}

func agentRuns(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool {
		return s.Name == agentContainer && s.State.Running != nil
	})
}

// Exec runs a command in an agent's container until it ends or ctx does, with a
// standard input that has no end before that: a command that ends with its input
// isn't left behind. It goes by the API server and kubelet, as kubectl exec does, and
// needs the right to create pods/exec; no port is opened anywhere.
func (c *Client) Exec(ctx context.Context, p AgentPod, command []string, stdout, stderr io.Writer) error {
	request := c.CoreV1().RESTClient().Post().Resource("pods").Namespace(p.Namespace).Name(p.Name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: agentContainer, Command: command, Stdin: true, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	executor, err := c.executor(request)
	if err != nil {
		return fmt.Errorf("exec in pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	stdin, end := io.Pipe()
	defer end.Close()
	stop := context.AfterFunc(ctx, func() { end.Close() })
	defer stop()
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Stderr: stderr})
	var exit utilexec.CodeExitError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit):
		return &ExitError{Code: exit.Code, what: fmt.Sprintf("%s in pod %s/%s", command[0], p.Namespace, p.Name)}
	case err != nil:
		return fmt.Errorf("exec in pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	return nil
}

// ExitError is that a command ended with another exit code than 0.
type ExitError struct {
	Code int
	what string
}

func (e *ExitError) Error() string { return fmt.Sprintf("%s ended with exit code %d", e.what, e.Code) }

// executor speaks WebSocket, and SPDY to servers before Kubernetes 1.29, or by way of
// proxies that know no other.
func (c *Client) executor(request *rest.Request) (remotecommand.Executor, error) {
	websocket, err := remotecommand.NewWebSocketExecutor(c.config, http.MethodGet, request.URL().String())
	if err != nil {
		return nil, err
	}
	spdy, err := remotecommand.NewSPDYExecutor(c.config, http.MethodPost, request.URL())
	if err != nil {
		return nil, err
	}
	return remotecommand.NewFallbackExecutor(websocket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
}
