//go:build cluster

package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"portcullis/bench/lab"
)

// observed watches all nodes through the API server, and asks each agent what differs. A
// denial is seen at once, on the node that denies, and one that the agents' successors
// make as well.
func (c *cluster) observed() {
	// Not by deploy/cluster/on: signals are for the program itself.
	through := func(args ...string) []string {
		argv := append([]string{"nsenter", "--net=/run/netns/pc-net", binary}, args...)
		return append(argv, "--kubeconfig", filepath.Join(repo, ".cluster/pki/admin.kubeconfig"))
	}
	watch, err := c.lab.Run(c.Context(), lab.Node, through("observe", "-f", "--to", "default/db", "--port", "6379")...)
	c.must(err)
	c.expect("deny tcp4 default/client default/db:6379\nallow tcp4 default/frontend default/db:6379")
	c.until("both decisions are shown", func() error {
		out := watch.Output()
		for _, want := range []string{"DENY   tcp default/client (", "is isolated for ingress by policy default/test-network-policy; no rule admits this  [pc-n1]", "ALLOW  tcp default/frontend ("} {
			if !strings.Contains(out, want) {
				return fmt.Errorf("no %q in\n%s", want, out)
			}
		}
		return nil
	})
	c.kubectl("-n", "portcullis", "rollout", "restart", "daemonset/portcullis")
	c.rolledOut()
	before := strings.Count(watch.Output(), "DENY")
	c.expect("deny tcp4 default/client default/db:6379")
	c.until("the agents' successors are watched", func() error {
		if out := watch.Output(); strings.Count(out, "DENY") == before {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	c.must(watch.Signal(syscall.SIGINT))
	if err := watch.Wait(patient); err != nil {
		c.Errorf("observe ends with %v: %s", err, watch.Output())
	}
	argv := through("top", "--once")
	top, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	for _, want := range []string{"pc-n1 ", "pc-n2 ", "default/client  default/db  6379/TCP  default/test-network-policy"} {
		if err != nil || !strings.Contains(string(top), want) {
			c.Errorf("top: %v, no %q in\n%s", err, want, top)
		}
	}
	argv = through("diff", "--all")
	c.until("no node differs", func() error {
		all, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		n1, n2 := strings.Index(string(all), "node pc-n1"), strings.Index(string(all), "node pc-n2")
		if err != nil || strings.Count(string(all), "no difference\n") != 2 || n1 < 0 || n2 < n1 {
			return fmt.Errorf("%v\n%s", err, all)
		}
		return nil
	})
}
