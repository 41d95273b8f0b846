package proof

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"time"
)

// roleWord, as a program's first argument, asks for a role instead of the proof.
const roleWord = "proof-role"

// RunRole plays the role that the command line asks for, if it asks for one: to
// serve, to load, to echo a queue. The program that runs the proof calls it before
// anything else, since it starts itself again for these.
func RunRole(args []string) (asked bool, err error) {
	if len(args) < 3 || args[1] != roleWord {
		return false, nil
	}
	return true, playRole(args[2], args[3:])
}

func playRole(role string, args []string) error {
	f := flag.NewFlagSet(role, flag.ContinueOnError)
	switch role {
	case "serve":
		return serve()
	case "connect", "udp", "stream":
		return runLoad(role, f, args)
	case "echo", "callback":
		return runEcho(role, f, args)
	case "react":
		return runReact(f, args)
	case "control-plane":
		return runControlPlane(f, args)
	case "populate":
		return runPopulate(f, args)
	case "probe":
		return runProbe(f, args)
	}
	return fmt.Errorf("no role %q", role)
}

func runEcho(role string, f *flag.FlagSet, args []string) error {
	var cfg echoConfig
	f.IntVar(&cfg.base, "base", 100, "first queue")
	f.IntVar(&cfg.count, "queues", 1, "how many queues")
	f.IntVar(&cfg.readBuffer, "read-buffer", 0, "bytes")
	f.BoolVar(&cfg.again, "again", false, "mark and repeat")
	f.DurationVar(&cfg.spin, "spin", 0, "before blocking")
	f.BoolVar(&cfg.batch, "batch", false, "one verdict for many")
	f.BoolVar(&cfg.together, "together", false, "many reads and verdicts a call")
	f.BoolVar(&cfg.raw, "raw", false, "write past the scheduler")
	f.BoolVar(&cfg.yield, "yield", false, "to the scheduler, now and then")
	f.BoolVar(&cfg.pin, "pin", false, "worker i on CPU i")
	f.DurationVar(&cfg.slice, "slice", 0, "the worker's time slice")
	f.BoolVar(&cfg.stamps, "stamps", false, "measure stages")
	if err := f.Parse(args); err != nil {
		return err
	}
	if role == "callback" {
		return echoByCallback(cfg)
	}
	return echo(cfg)
}

func runLoad(role string, f *flag.FlagSet, args []string) error {
	from := f.String("from", "", "first client address")
	to := f.String("to", "", "first server address")
	count := f.Int("pairs", 1, "how many pairs of addresses")
	clients := f.Int("clients", 1, "how many at once")
	tries := f.Int("tries", 0, "of each client")
	forTime := f.Duration("for", 0, "how long")
	keep := f.Bool("keep", false, "keep latencies")
	ahead := f.Bool("ahead", false, "a denied datagram ahead")
	if err := f.Parse(args); err != nil {
		return err
	}
	pairs, err := pairsFrom(*from, *to, *count)
	if err != nil {
		return err
	}
	if *tries <= 0 && *forTime <= 0 || *forTime > time.Minute {
		return errors.New("a load needs an end")
	}
	var r load
	switch role {
	case "connect":
		r = connectAll(pairs, *clients, stopAt{*tries, *forTime}, *keep)
	case "udp":
		r = echoAll(pairs[0], *tries, *ahead)
	case "stream":
		if r, err = stream(pairs[0], *forTime); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// pairsFrom gives n pairs of addresses, counting up from the first.
func pairsFrom(from, to string, n int) ([]pair, error) {
	a, err1 := netip.ParseAddr(from)
	b, err2 := netip.ParseAddr(to)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	pairs := make([]pair, 0, n)
	for range n {
		pairs = append(pairs, pair{a, b})
		a, b = a.Next(), b.Next()
	}
	return pairs, nil
}
