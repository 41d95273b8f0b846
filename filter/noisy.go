package filter

import (
	"errors"
	"fmt"
	"net/netip"
)

// One source that opens connections faster than they can be judged would fill the
// queues that all share, and everybody's first packets would be dropped with its
// own. So what a source sends beyond a rate goes to a queue of its own, the noisy
// one, which is short and served by a worker that runs when nobody else does. There it is
// judged as exactly as elsewhere, its flows are remembered in a cache of its own and
// its records have a ring of their own: whatever it does, it does to itself.
//
// What a source is must be something that nobody can make up at will, since the
// kernel's table of rates has a limit, and drops what doesn't fit (xt_hashlimit.c,
// hotdrop). A pod of this node is known by its address. Whatever else comes, be it
// from a true address or an invented one, is told by the pod that it goes to: a
// flood from anywhere may make noise for one pod, and the others don't hear it. So
// there are never more entries than this node has pods.

const (
	// DefaultNoisyRate is far beyond what services open in connections, and a
	// small part of what a worker can judge.
	DefaultNoisyRate = 2000
	// MaxNoisyRate is well below where xt_hashlimit stops counting (a million).
	MaxNoisyRate = 100_000
	// noisyMaxLen keeps the noisy queue short: who waits in it behind a flood
	// would wait in vain.
	noisyMaxLen = 512
	// noisyRecords is how many of its decisions are logged in a second: some twentieth
	// of a processor's time.
	noisyRecords = 10_000
)

var errNoHashlimit = errors.New("the kernel has no hashlimit match for iptables: run modprobe xt_hashlimit")

// QueueSpan gives how many queue numbers an agent takes, from its base on: those of
// its queues, and one more for the noisy queue, which comes last.
func QueueSpan(queues, noisyRate int) int {
	if noisyRate > 0 {
		return queues + 1
	}
	return queues
}

// noisyRules send what is too much to the noisy queue. They come before the rule
// that queues what has this end isolated; no packet is counted twice, since the
// isolated sources have left the chain before the others are looked at.
func (g gate) noisyRules(fam family, end string) []string {
	if g.noisyRate == 0 {
		return nil
	}
	queue := g.noisyQueue()
	isolated := "-m set --match-set " + g.isolated(fam) + " " + end
	if end == "src" {
		return []string{isolated + " " + g.above("src") + " " + queue}
	}
	return []string{
		isolated + " -m set --match-set " + fam.pods().at(g.slot).name + " src " + g.above("src") + " " + queue,
		isolated + " -m set ! --match-set " + fam.pods().at(g.slot).name + " src " + g.above("dst") + " " + queue,
	}
}

// noisyUnknown does so with the packets of unknown pods. These could be invented, all
// of a range, so they are counted together.
func (g gate) noisyUnknown(fam family, end string) []string {
	if g.noisyRate == 0 {
		return nil
	}
	return []string{fmt.Sprintf("-m set --match-set %s %s -m hashlimit --hashlimit-above %d/sec --hashlimit-burst %d --hashlimit-name portcullis-unknown-%d %s",
		fam.unknown().at(g.slot).name, end, g.noisyRate, g.noisyRate, g.noisyRate, g.noisyQueue())}
}

func (g gate) noisyQueue() string {
	queue := fmt.Sprintf("-j NFQUEUE --queue-num %d", int(g.queueBase)+g.queues)
	if g.failOpen {
		queue += " --queue-bypass"
	}
	return queue
}

// above is the match of what is beyond the rate, by the packet's source or
// destination. Rules with tables of the same name share the table and what it was
// first made with, so the name tells the rate.
func (g gate) above(end string) string {
	return fmt.Sprintf("-m hashlimit --hashlimit-above %d/sec --hashlimit-burst %d --hashlimit-mode %sip "+
		"--hashlimit-name portcullis-%s-%d --hashlimit-htable-size 1024 --hashlimit-htable-max %d --hashlimit-htable-expire 10000",
		g.noisyRate, g.noisyRate, end, end, g.noisyRate, setMaxMembers)
}

// doWithoutNoisy gives the noisy queue up if that is what an installation failed
// of, says so, and tells whether it is worth another try. The caller holds ruleLock.
func (k *Kernel) doWithoutNoisy(err error) bool {
	if k.gate.noisyRate == 0 || !errors.Is(err, errNoHashlimit) {
		return false
	}
	k.setLock.Lock() // those of the sets look at it as well
	k.gate.noisyRate = 0
	k.setLock.Unlock()
	k.log.Warn("one source that floods can starve the others, since there is no queue for it", "reason", err)
	return true
}

// SetPods tells the addresses of all pods of this node, isolated or not, by which
// the noisy among them are known. The next SetIsolated or Repair brings the sets up
// to date.
func (k *Kernel) SetPods(addrs []netip.Addr) {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	k.pods = addrSet(addrs)
}

func addrSet(addrs []netip.Addr) map[netip.Addr]bool {
	set := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		set[a.Unmap().WithZone("")] = true
	}
	return set
}
