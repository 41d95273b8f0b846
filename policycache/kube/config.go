// Package kube takes the cluster's state from the Kubernetes API server: once,
// for explain and matrix, or watched, for the agent.
package kube

import (
	"errors"
	"fmt"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Config says how to reach the API server, as kubectl's flags do. Its zero
// value means what kubectl does without flags, and within a pod the pod's
// service account.
type Config struct {
	Kubeconfig string // path; empty for $KUBECONFIG, then ~/.kube/config
	Context    string // empty for the current one
	UserAgent  string
}

// Client is a connection to an API server, not yet tried.
type Client struct {
	kubernetes.Interface
	// Host is the server's address, for messages.
	Host string
	// Namespace is the one that the context names, "default" if none.
	Namespace string
	heard     *heard
	config    *rest.Config // as it was found, for Exec
}

// ErrNoCluster says that neither flags, environment nor a pod's account name a cluster.
var ErrNoCluster = errors.New("no cluster is configured: give --manifests DIR, --kubeconfig FILE or $KUBECONFIG, or run in a pod")

// Connect makes a client. It reads the configuration and doesn't talk to the
// server.
func Connect(c Config) (*Client, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = c.Kubeconfig
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: c.Context})
	config, err := loader.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, ErrNoCluster
	}
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	return connect(config, namespace, c.UserAgent)
}

func connect(config *rest.Config, namespace, userAgent string) (*Client, error) {
	heard := newHeard()
	config = rest.CopyConfig(config)
	plain := rest.CopyConfig(config)
	config.UserAgent = userAgent
	// Protobuf takes a fraction of JSON's time and garbage to decode.
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	config.QPS, config.Burst = 50, 100
	config.Wrap(heard.wrap)
	clientset, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	return &Client{Interface: clientset, Host: config.Host, Namespace: namespace, heard: heard, config: plain}, nil
}

// fetchTimeout bounds a one-time read of the whole state, so that a server that
// doesn't answer is an error and not a hang.
const fetchTimeout = 30 * time.Second
