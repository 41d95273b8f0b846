package main

import (
	"fmt"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portcullis/filter"
)

// defaultMarkBits are the two bits of the packet and connection mark that
// Portcullis takes for itself, as --mark-bits writes them.
var defaultMarkBits = fmt.Sprintf("%#x", filter.DefaultMarkBits)

// agentOptions are the flags of agent.
type agentOptions struct {
	cluster     clusterFlags
	node        string
	queueBase   int
	queues      int
	queueLength uint32
	readBuffer  int
	copyRange   uint32
	cacheSize   int
	failOpen    bool
	markBits    string
	backend     string
	sysctlDir   string
	cniResults  string
	decisions   decisionLogFlags
	http        string
	logs        logFlags
}

func newAgentCmd() *cobra.Command {
	var o agentOptions
	cmd := &cobra.Command{
		Use:   "agent --node NAME [--manifests DIR | --kubeconfig FILE]",
		Short: "Enforce NetworkPolicy on this node",
		Long: `Agent enforces NetworkPolicy for the pods of one node, in the network namespace
that it runs in. The kernel hands it the first packet of each connection of an
isolated pod. It follows the cluster's state as it changes: by the API server,
found as kubectl finds it or, in a pod, by the service account; or by a
directory of manifests. While the API server is away the last known state stays
in force.

It is ready (see /readyz of --http) when the state is loaded, the policy
compiled, the queues bound, the rules in place and the connections judged that
were open already. On SIGTERM it leaves the gate
as --fail-open says: closed, the rules stay, and new connections of isolated
pods wait for the next agent; open, the rules go.`,
		Example: `  portcullis agent --manifests /etc/portcullis/cluster --node worker-1 --decision-log -
  portcullis agent --kubeconfig /etc/portcullis/kubeconfig --node worker-1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := o.logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if err := o.check(); err != nil {
				return err
			}
			// Nobody reading a log any more must not shut the gate for all.
			defer outlivePipes()()
			return runAgent(cmd.Context(), &o, cmd.OutOrStdout(), log)
		},
	}
	o.register(cmd.Flags())
	return cmd
}

func (o *agentOptions) register(f *pflag.FlagSet) {
	o.cluster.register(f)
	f.StringVar(&o.node, "node", os.Getenv("NODE_NAME"), "name of this node: the agent judges the pods whose spec.nodeName it is (default $NODE_NAME)")
	f.IntVar(&o.queueBase, "queue-base", 100, "number of the first NFQUEUE queue")
	f.IntVar(&o.queues, "queues", min(runtime.NumCPU(), 4), "how many queues, each with a worker of its own")
	f.Uint32Var(&o.queueLength, "queue-length", filter.DefaultMaxLen, "how many packets the kernel holds per queue")
	f.IntVar(&o.readBuffer, "queue-read-buffer", filter.DefaultReadBuffer, "receive buffer of a queue's socket in bytes")
	f.Uint32Var(&o.copyRange, "copy-range", filter.DefaultCopyRange, "how many bytes of a packet are read, headers included")
	f.IntVar(&o.cacheSize, "cache-size", 8192, "how many flows a worker remembers the verdict of; 0 for none")
	f.BoolVar(&o.failOpen, "fail-open", false, "let connections pass while no agent runs, or when a queue is full")
	f.StringVar(&o.markBits, "mark-bits", defaultMarkBits, "two bits of the packet mark that nobody else uses")
	f.StringVar(&o.backend, "iptables-backend", "auto", "auto, nft or legacy; auto follows what the node uses")
	f.StringVar(&o.cniResults, "cni-results", "", "directory of the CNI plugins' results, usually /var/lib/cni/results: guards a pod before its first container starts")
	f.StringVar(&o.sysctlDir, "sysctl-dir", filter.SysctlDir, "where the node's sysctls can be written; a container sees its own read-only")
	o.decisions.register(f)
	f.StringVar(&o.http, "http", "127.0.0.1:9353", "address of /healthz, /readyz and /metrics; empty for none")
	o.logs.register(f)
}

var backends = []string{"auto", "nft", "legacy"}

// check finds what is wrong with the flags before anything is touched.
func (o *agentOptions) check() error {
	switch {
	case o.cluster.check() != nil:
		return o.cluster.check()
	case o.node == "":
		return fmt.Errorf("--node is missing: name the node whose pods this agent judges")
	case o.queues < 1:
		return fmt.Errorf("--queues %d: at least one queue is needed", o.queues)
	case o.queueBase < 0 || o.queueBase+o.queues-1 > math.MaxUint16:
		return fmt.Errorf("--queue-base %d with %d queues is not within 0 to 65535", o.queueBase, o.queues)
	case !slices.Contains(backends, o.backend):
		return fmt.Errorf("--iptables-backend %q: want %s", o.backend, strings.Join(backends, ", "))
	case o.cacheSize < 0:
		return fmt.Errorf("--cache-size %d is below zero", o.cacheSize)
	}
	if o.http != "" {
		if _, _, err := net.SplitHostPort(o.http); err != nil {
			return fmt.Errorf("--http %q is not an address such as 127.0.0.1:9353", o.http)
		}
	}
	return o.decisions.check()
}
