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
	LatencyNs []int64 // of each change, from before its file was touched
	Failed    int
	ElapsedNs int64
}

// openLabel is the label by which a policy that is always there opens a server.
var openLabel = labels("open", "yes")

// changeSteps are the changes that a server goes through again and again. Each is
// one file written, or removed, and turns the fate of datagrams to changePort.
var changeSteps = []struct {
	admitted bool
	make     func(dir string, server int) error
}{
	{true, func(dir string, i int) error {
		return writeManifests(reactFile(dir, i), changePolicy("react-"+serverName(i), labels("pod", serverName(i))))
	}},
	{false, func(dir string, i int) error { return removeManifest(reactFile(dir, i)) }},
	{true, func(dir string, i int) error { return writeManifests(serverFile(dir, i), serverManifest(i, openLabel)) }},
	{false, func(dir string, i int) error { return writeManifests(serverFile(dir, i), serverManifest(i, nil)) }},
}

func reactFile(dir string, i int) string {
	return filepath.Join(dir, "react-"+serverName(i)+".json")
}

// runReact is the role that changes files at a rate and watches, with datagrams,
// when each change is in force. Servers take turns; one's next change waits until
// its last one has been seen.
func runReact(f *flag.FlagSet, args []string) error {
	from := f.String("from", "", "first client address")
	to := f.String("to", "", "first server address")
	count := f.Int("pairs", 50, "how many servers change")
	dir := f.String("dir", "", "the manifests")
	rate := f.Int("rate", 50, "changes per second")
	changes := f.Int("changes", 250, "how many")
	limit := f.Duration("limit", 10*time.Second, "for one to be in force")
	if err := f.Parse(args); err != nil {
		return err
	}
	pairs, err := pairsFrom(*from, *to, *count)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var all sync.WaitGroup
	var r reaction
	start := time.Now()
	for server, p := range pairs {
		all.Go(func() {
			for n := server; n < *changes; n += *count {
				time.Sleep(time.Until(start.Add(time.Duration(n) * time.Second / time.Duration(*rate))))
				took, err := reactOnce(*dir, server, p, n / *count, *limit)
				mu.Lock()
				if err != nil {
					r.Failed++
				} else {
					r.LatencyNs = append(r.LatencyNs, int64(took))
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
func reactOnce(dir string, server int, p pair, turn int, limit time.Duration) (time.Duration, error) {
	step := changeSteps[turn%len(changeSteps)]
	start := time.Now()
	if err := step.make(dir, server); err != nil {
		return 0, err
	}
	at, err := watchFor(p, changePort, step.admitted, limit)
	return at.Sub(start), err
}
