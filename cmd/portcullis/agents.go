package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"portcullis/policycache/kube"
	"portcullis/policycache/live"
)

// agentFlags say whom observe and top ask: the agent of this node by its socket, or all
// agents by way of the API server.
type agentFlags struct {
	socket     string
	namespace  string
	cluster    clusterFlags
	untilEOF   bool
	socketMade bool // the user named the socket
}

func (a *agentFlags) register(f *pflag.FlagSet) {
	f.StringVar(&a.socket, "socket", defaultSocket, "the agent's Unix socket on this node")
	f.StringVar(&a.cluster.kubeconfig, "kubeconfig", "", "kubeconfig of the API server by which all nodes' agents are asked, instead of a socket (default where there is no socket: as kubectl)")
	f.StringVar(&a.cluster.context, "context", "", "context of the kubeconfig (default the current one)")
	f.StringVar(&a.namespace, "agents-namespace", "portcullis", "namespace of the agents' pods")
	f.BoolVar(&a.untilEOF, "until-eof", false, "end when standard input does")
	// It is for the command that is run in the agents' pods, so that it isn't left behind.
	f.Lookup("until-eof").Hidden = true
}

func (a *agentFlags) check(f *pflag.FlagSet) error {
	a.socketMade = f.Changed("socket")
	if a.socketMade && (a.cluster.kubeconfig != "" || a.cluster.context != "") {
		return errors.New("--socket excludes --kubeconfig and --context: it is this node's agent or all of them")
	}
	return nil
}

// agentSource is an agent that can be asked.
type agentSource interface {
	// key tells agents apart, one that took another's place on its node too.
	key() string
	// name is the node's, or the socket's path.
	name() string
	// decisions hands each line, which is to be kept as it is, to use, and tells whether it
	// is from before the question; seen is called when all of those have come. It returns
	// when there are no more, with follow when the agent ends, and on errors.
	decisions(ctx context.Context, q decisionQuery, use func(line []byte, old bool) error, seen func()) error
	// samples hands over the agent's figures again and again.
	samples(ctx context.Context, every time.Duration, use func(*live.Sample)) error
}

// decisionQuery says which decisions are wanted.
type decisionQuery struct {
	follow bool
	// flags are those of observe that filter, for an agent that can filter by itself.
	flags []string
}

// fleet is the agents that are asked. The list changes with time.
type fleet struct {
	list func(ctx context.Context) ([]agentSource, error)
}

// open finds out whom to ask.
func (a *agentFlags) open() (*fleet, error) {
	local := dialAgent(a.socket)
	if a.socketMade || a.cluster.kubeconfig == "" && a.cluster.context == "" && local.there() {
		return &fleet{func(context.Context) ([]agentSource, error) { return []agentSource{local}, nil }}, nil
	}
	// client-go would tell on standard error of each connection that ends.
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	client, err := a.cluster.connect()
	if errors.Is(err, kube.ErrNoCluster) {
		return nil, fmt.Errorf("there is no agent's socket at %s, and no cluster is configured: run this on an agent's node, or give --kubeconfig FILE or $KUBECONFIG", a.socket)
	}
	if err != nil && a.cluster.kubeconfig == "" && a.cluster.context == "" {
		return nil, fmt.Errorf("there is no agent's socket at %s, and %w", a.socket, err)
	}
	if err != nil {
		return nil, err
	}
	return &fleet{func(ctx context.Context) (all []agentSource, err error) {
		pods, err := agentPods(ctx, client, a.namespace)
		for _, p := range pods {
			all = append(all, p)
		}
		return all, err
	}}, nil
}

// agentPods lists the agents that the API server leads to, of which there must be one.
func agentPods(ctx context.Context, client *kube.Client, namespace string) ([]podSource, error) {
	pods, err := client.Agents(ctx, namespace)
	if err != nil {
		return nil, err
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("there is no agent's pod in namespace %s: name theirs by --agents-namespace", namespace)
	}
	all := make([]podSource, len(pods))
	for i, p := range pods {
		all[i] = podSource{client, p}
	}
	return all, nil
}

// troubles tells of agents that can't be asked, each trouble once.
type troubles struct {
	mu   sync.Mutex
	w    io.Writer
	said map[string]string
}

func newTroubles(w io.Writer) *troubles { return &troubles{w: w, said: map[string]string{}} }

func (t *troubles) tell(name string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if text := oneLine(err); t.said[name] != text {
		t.said[name] = text
		fmt.Fprintf(t.w, "%s: %s\n", name, text)
	}
}

// over says that an agent answers, if it didn't before.
func (t *troubles) over(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.said[name] != "" {
		delete(t.said, name)
		fmt.Fprintf(t.w, "%s: answers again\n", name)
	}
}

// follow has run talk to each agent until ctx ends: to those that come, in the place of
// others or on new nodes, and again to those that have ended. first is the list as it is
// known.
func (f *fleet) follow(ctx context.Context, first []agentSource, run func(context.Context, agentSource) error, troubles *troubles) {
	var mu sync.Mutex
	running := map[string]bool{}
	var all sync.WaitGroup
	defer all.Wait()
	start := func(s agentSource) {
		mu.Lock()
		defer mu.Unlock()
		if running[s.key()] {
			return
		}
		running[s.key()] = true
		all.Go(func() {
			err := run(ctx, s)
			if err == nil && ctx.Err() == nil {
				err = errAgentEnded
			}
			// What went wrong before ctx ended is told, though it be told after.
			if err != nil && !errors.Is(err, context.Canceled) {
				troubles.tell(s.name(), err)
			}
			mu.Lock()
			defer mu.Unlock()
			delete(running, s.key())
		})
	}
	tick := time.NewTicker(listEvery)
	defer tick.Stop()
	for {
		for _, s := range first {
			start(s)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := f.list(ctx)
		if err != nil && ctx.Err() == nil {
			troubles.tell("the agents", err)
		} else if err == nil {
			troubles.over("the agents")
			first = now
		}
	}
}

// untilInputEnds gives a context that ends with the standard input, if that is asked for.
func (a *agentFlags) untilInputEnds(ctx context.Context, stdin io.Reader) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	if a.untilEOF {
		go func() {
			io.Copy(io.Discard, stdin) // its end is all that counts
			cancel()
		}()
	}
	return ctx, cancel
}

// listEvery is how often the list of agents is read anew while they are followed.
const listEvery = 2 * time.Second
