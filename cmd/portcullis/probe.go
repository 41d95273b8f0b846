package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"
)

func newProbeCmd() *cobra.Command {
	var address, pod string
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Tell by the exit code whether this pod's own agent answers",
		Long: `Probe asks the agent at --http for its health, and ends with 0 if it answers and
is of the pod --pod-uid. It is for a startup probe: during a rolling update two
agents share the node's loopback, and the older one has the port until it has
handed the gate over, so that a plain HTTP probe of the new pod would be answered
by the old one.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return probe(cmd.Context(), address, pod) },
	}
	cmd.Flags().StringVar(&address, "http", defaultHTTP, "the agent's address, as in its --http")
	cmd.Flags().StringVar(&pod, "pod-uid", os.Getenv("POD_UID"), "the pod whose agent is meant (default $POD_UID)")
	return cmd
}

// anyPod is what probe takes where it doesn't matter whose agent answers.
const anyPod = "*"

// probe asks the agent at an address whether it is the pod's.
func probe(ctx context.Context, address, pod string) error {
	client := &http.Client{Timeout: 2 * time.Second}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+reachable(address)+"/healthz", nil)
	if err != nil {
		return fmt.Errorf("--http %q is not an address such as %s", address, defaultHTTP)
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	switch {
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("the agent answers %s", resp.Status)
	case resp.Header.Get("Server") != serverName:
		return fmt.Errorf("what answers at %s is no Portcullis agent", address)
	case pod != anyPod && resp.Header.Get(podHeader) != pod:
		return fmt.Errorf("the agent of another pod answers: %q, this is %q", resp.Header.Get(podHeader), pod)
	}
	return nil
}

// reachable gives an address to connect to for one to listen at.
func reachable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if ip, perr := netip.ParseAddr(host); err == nil && (host == "" || perr == nil && ip.IsUnspecified()) {
		return net.JoinHostPort("localhost", port)
	}
	return address
}
