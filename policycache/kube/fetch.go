package kube

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/pager"

	"portcullis/policycache"
)

// Fetch reads the whole state once, in pages. It is for questions about the
// cluster as it is now; an agent follows it with a Watcher.
func Fetch(ctx context.Context, c *Client) (*policycache.Objects, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	s := newState()
	lists := map[string]pager.ListPageFunc{
		pods: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.CoreV1().Pods(corev1.NamespaceAll).List(ctx, o)
		},
		namespaces: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.CoreV1().Namespaces().List(ctx, o)
		},
		nodes: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.CoreV1().Nodes().List(ctx, o)
		},
		policies: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return c.NetworkingV1().NetworkPolicies(corev1.NamespaceAll).List(ctx, o)
		},
	}
	for _, resource := range resources {
		err := pager.New(lists[resource]).EachListItem(ctx, metav1.ListOptions{}, func(object runtime.Object) error {
			kept, err := transform(object)
			if err == nil {
				s.set(kept.(*slim))
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("can't read %s from %s: %s", resource, c.Host, describe(resource, err))
		}
	}
	return s.take(), nil
}
