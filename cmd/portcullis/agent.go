package main

import (
	"fmt"
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
	burst       int
	copyRange   uint32
	cacheSize   int
	noisyRate   int
	failOpen    bool
	markBits    string
	backend     string
	sysctlDir   string
	cniResults  string
	hold        holdFlags
	antiSpoof   bool
	decisions   decisionLogFlags
	auditOnly   bool
	events      bool
	http        string
	podUID      string
	standby     bool
	socket      string
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
were open already. An agent that runs already hands over: the new one takes queues
of its own, switches the rules to them, and the old one gives the last verdicts
that it owes and ends. On SIGTERM an agent leaves the gate
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
	f.IntVar(&o.queueBase, "queue-base", 100, "number of the first NFQUEUE queue; while it takes over from another an agent uses the range after that")
	f.IntVar(&o.queues, "queues", min(runtime.NumCPU(), 4), "how many queues, each with a worker of its own")
	f.IntVar(&o.noisyRate, "noisy-rate", filter.DefaultNoisyRate, "first packets a second of one pod, or from elsewhere to one pod, beyond which they go to a queue apart (the number after --queues), lest others wait for them; 0 for no such queue")
	f.Uint32Var(&o.queueLength, "queue-length", filter.DefaultMaxLen, "how many packets the kernel holds per queue")
	f.IntVar(&o.burst, "queue-burst", filter.DefaultBurst, "packets that are read together where they wait, and answered together")
	f.IntVar(&o.readBuffer, "queue-read-buffer", filter.DefaultReadBuffer, "receive buffer of a queue's socket in bytes")
	f.Uint32Var(&o.copyRange, "copy-range", filter.DefaultCopyRange, "how many bytes of a packet are read, headers included")
	f.IntVar(&o.cacheSize, "cache-size", 8192, "how many flows a worker remembers the verdict of; 0 for none")
	f.BoolVar(&o.failOpen, "fail-open", false, "let connections pass while no agent runs, or when a queue is full")
	f.StringVar(&o.markBits, "mark-bits", defaultMarkBits, "two bits of the packet mark that nobody else uses")
	f.StringVar(&o.backend, "iptables-backend", "auto", "auto, nft or legacy; auto follows what the node uses")
	f.StringVar(&o.cniResults, "cni-results", "", "directory of the CNI plugins' results, usually /var/lib/cni/results: guards a pod before its first container starts")
	f.StringVar(&o.sysctlDir, "sysctl-dir", filter.SysctlDir, "where the node's sysctls can be written; a container sees its own read-only")
	f.BoolVar(&o.auditOnly, "audit-only", false, "deny nothing, and log as would-deny what would be denied; the annotation portcullis.dev/mode (enforce or audit-only) of the node, or of a namespace, goes before it")
	f.BoolVar(&o.events, "events", false, "write Kubernetes events on pods whose connections are denied, for kubectl describe; it needs the right to create and patch events")
	o.hold.register(f)
	f.BoolVar(&o.antiSpoof, "anti-spoof", false, "drop what leaves a pod's interface with an address that isn't the pod's; for bridged pods by --cni-results")
	o.decisions.register(f)
	f.StringVar(&o.http, "http", defaultHTTP, "address of /healthz, /readyz and /metrics; empty for none")
	f.StringVar(&o.podUID, "pod-uid", os.Getenv("POD_UID"), "the pod that this is, for portcullis probe (default $POD_UID)")
	f.BoolVar(&o.standby, "standby", false, "having handed over to a newer agent, wait for it to end instead of ending: a DaemonSet's containers must not end")
	f.StringVar(&o.socket, "socket", defaultSocket, "Unix socket for observe, top, diff, explain --agent and pprof, for its owner only; empty for none")
	o.logs.register(f)
}

var backends = []string{"auto", "nft", "legacy"}

// check finds what is wrong with the flags before anything is touched.
func (o *agentOptions) check() error {
	switch {
	case o.cluster.check() != nil:
		return o.cluster.check()
	case o.events && o.cluster.manifests != "":
		return fmt.Errorf("--events needs an API server to write them to, not --manifests")
	case o.node == "":
		return fmt.Errorf("--node is missing: name the node whose pods this agent judges")
	case o.queues < 1:
		return fmt.Errorf("--queues %d: at least one queue is needed", o.queues)
	case o.noisyRate < 0 || o.noisyRate > filter.MaxNoisyRate:
		return fmt.Errorf("--noisy-rate %d is not within 0 to %d", o.noisyRate, filter.MaxNoisyRate)
	case o.queueBase < 0 || o.queueBase+2*filter.QueueSpan(o.queues, o.noisyRate)-1 > filter.LastQueue:
		return fmt.Errorf("--queue-base %d with twice %d queues is not within 0 to %d", o.queueBase, filter.QueueSpan(o.queues, o.noisyRate), filter.LastQueue)
	case o.burst < 1 || o.burst > filter.MaxBurst:
		return fmt.Errorf("--queue-burst %d is not within 1 to %d", o.burst, filter.MaxBurst)
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
	if err := o.hold.check(); err != nil {
		return err
	}
	return o.decisions.check()
}
