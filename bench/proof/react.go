package proof

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// reaction is what a series of changes has found.
type reaction struct {
	LatencyNs []int64 // of each change, from before its file was touched, or before it was asked of the API server
	MadeNs    []int64 // of the same, what the touch or the request took itself
	Failed    int
	ElapsedNs int64
}

// openLabel is the label by which a policy that is always there opens a server.
var openLabel = labels("open", "yes")

// changer makes the changes that a reaction is measured to.
type changer interface {
	policyComes(server int) error
	policyGoes(server int) error
	relabel(server int, extra labelMap) error
}

// changeSteps are the changes that a server goes through again and again. Each turns
// the fate of datagrams to changePort.
var changeSteps = []struct {
	admitted bool
	make     func(c changer, server int) error
}{
	{true, changer.policyComes},
	{false, changer.policyGoes},
	{true, func(c changer, server int) error { return c.relabel(server, openLabel) }},
	{false, func(c changer, server int) error { return c.relabel(server, nil) }},
}

// fileChanges makes changes in a directory of manifests, each one file written or
// removed.
type fileChanges string

func (dir fileChanges) policyComes(server int) error {
	return writeManifests(reactFile(string(dir), server), changePolicy("react-"+serverName(server), labels("pod", serverName(server))))
}

func (dir fileChanges) policyGoes(server int) error {
	return removeManifest(reactFile(string(dir), server))
}

func (dir fileChanges) relabel(server int, extra labelMap) error {
	return writeManifests(serverFile(string(dir), server), serverManifest(server, extra))
}

func reactFile(dir string, i int) string {
	return filepath.Join(dir, "react-"+serverName(i)+".json")
}

// runReact is the role that changes files, or an API server's objects, at a rate and watches, with datagrams,
// when each change is in force. Servers take turns; one's next change waits until
// its last one has been seen.
func runReact(f *flag.FlagSet, args []string) error {
	from := f.String("from", "", "first client address")
	to := f.String("to", "", "first server address")
	count := f.Int("pairs", 50, "how many servers change")
	dir := f.String("dir", "", "the manifests")
	kubeconfig := f.String("kubeconfig", "", "an API server in their place")
	netns := f.String("netns", "", "the network namespace from where that can be reached")
	rate := f.Int("rate", 50, "changes per second")
	number := f.Int("changes", 250, "how many")
	limit := f.Duration("limit", 10*time.Second, "for one to be in force")
	if err := f.Parse(args); err != nil {
		return err
	}
	pairs, err := pairsFrom(*from, *to, *count)
	if err != nil {
		return err
	}
	var changes changer = fileChanges(*dir)
	if *kubeconfig != "" {
		client, err := connectAPI(*kubeconfig, *netns)
		if err != nil {
			return err
		}
		changes = apiChanges{client}
	}
	var mu sync.Mutex
	var all sync.WaitGroup
	var r reaction
	start := time.Now()
	for server, p := range pairs {
		all.Go(func() {
			for n := server; n < *number; n += *count {
				time.Sleep(time.Until(start.Add(time.Duration(n) * time.Second / time.Duration(*rate))))
				made, took, err := reactOnce(changes, server, p, n / *count, *limit)
				mu.Lock()
				if err != nil {
					r.Failed++
				} else {
					r.LatencyNs, r.MadeNs = append(r.LatencyNs, int64(took)), append(r.MadeNs, int64(made))
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	r.ElapsedNs = int64(time.Since(start))
	return json.NewEncoder(os.Stdout).Encode(r)
}

// reactOnce makes one change and waits for it.
func reactOnce(c changer, server int, p pair, turn int, limit time.Duration) (made, took time.Duration, err error) {
	step := changeSteps[turn%len(changeSteps)]
	start := time.Now()
	if err := step.make(c, server); err != nil {
		return 0, 0, err
	}
	made = time.Since(start)
	at, err := watchFor(p, changePort, step.admitted, limit)
	return made, at.Sub(start), err
}
