package filter

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// mangle is the table that all rules are in. An accept of the queue ends the
// packet's way through this table only, so that it bypasses nobody's rules in
// the filter table; and FORWARD comes after DNAT and before SNAT.
const mangle = "mangle"

// chainPrefix begins the name of every chain of ours, of whatever version.
const chainPrefix = "PORTCULLIS-"

func isOurs(chain string) bool { return strings.HasPrefix(chain, chainPrefix) }

// chains names the two chains of one generation. Chains are never changed once
// a jump leads to them: what differs is built as the next generation.
type chains struct{ forward, postrouting string }

func generation(n int) chains {
	return chains{
		forward:     chainPrefix + "FWD-" + strconv.Itoa(n),
		postrouting: chainPrefix + "POST-" + strconv.Itoa(n),
	}
}

func (g chains) holds(chain string) bool { return chain == g.forward || chain == g.postrouting }

// freeGeneration gives names that no chain has and no rule leads to.
func (l listing) freeGeneration() chains {
	for n := 1; ; n++ {
		g := generation(n)
		taken := slices.ContainsFunc(l.chains, g.holds) ||
			slices.ContainsFunc(l.rules, func(r rule) bool { return g.holds(r.target()) })
		if !taken {
			return g
		}
	}
}

// jump is a rule of a built-in chain that leads into a chain of ours.
type jump struct {
	from string
	spec []string
}

// jumps gives the rules that lead into a generation. FORWARD sees what goes
// through the node. IPVS hands what it has translated to OUTPUT instead: those
// packets are told from the node's own by a source that isn't local.
func (g chains) jumps() []jump {
	return []jump{
		{"FORWARD", []string{"-j", g.forward}},
		{"OUTPUT", []string{"-m", "addrtype", "!", "--src-type", "LOCAL", "-j", g.forward}},
		{"POSTROUTING", []string{"-j", g.postrouting}},
	}
}

// gate is all that the rules depend on. Their number doesn't depend on the
// number of pods: those are in the sets.
type gate struct {
	queueBase uint16
	queues    int
	failOpen  bool
	markBits  uint32
	slot      int  // which of the agents on this node: see memberSet.at
	unknown   bool // queue unknown pods' packets too
	noisyRate int  // packets a second; 0 for no noisy queue
}

// span is how many queue numbers an agent takes.
func (g gate) span() int { return QueueSpan(g.queues, g.noisyRate) }

// isolated names the set of isolated addresses that the rules look into.
func (g gate) isolated(fam family) string { return fam.isolated().at(g.slot).name }

// forwardRules are the rules of the chain that FORWARD and OUTPUT jump to.
//
// The last, which hand packets to the queues, don't ask for the conntrack
// state NEW on purpose. What comes that far is NEW or UNTRACKED, and the
// untracked must be judged too, each packet of them: else a NOTRACK rule would
// open the gate.
func (g gate) forwardRules(fam family) [][]string {
	accepted, revoked := AcceptedMark(g.markBits), RevokedMark(g.markBits)
	var rules [][]string
	add := func(format string, args ...any) {
		rules = append(rules, strings.Fields(fmt.Sprintf(format, args...)))
	}
	if fam == 6 {
		// Neighbour discovery (RFC 4861): without it no IPv6 at all. It never
		// crosses a router, and a hop limit of 255 proves that it hasn't: with
		// any other it would be a way around the gate.
		for typ := 133; typ <= 137; typ++ {
			add("-p ipv6-icmp -m icmp6 --icmpv6-type %d -m hl --hl-eq 255 -j RETURN", typ)
		}
	}
	add("-m connmark --mark 0x%x/0x%x -j DROP", revoked, revoked)
	add("-m conntrack --ctstate ESTABLISHED,RELATED -j RETURN")
	// Packets of a stream that nobody answers stay NEW: what was accepted
	// once is known by the mark.
	add("-m connmark --mark 0x%x/0x%x -j RETURN", accepted, accepted)
	// A packet just accepted comes by again, so that the rules of others behind
	// ours see it: see verdictMessage.accept.
	add("-m mark --mark 0x%x/0x%x -j RETURN", accepted, accepted)
	// The node's own packets never come by here: they leave by OUTPUT, which
	// sends only others' to this chain. What came in by wire in the node's name
	// is forged, to be taken for a node's traffic with its own pods. IPv4
	// routing refuses such packets itself; bridges and IPv6 routing don't.
	add("-m addrtype --src-type LOCAL -m set --match-set %s dst -j DROP", g.isolated(fam))
	for _, end := range []string{"src", "dst"} {
		add("-m conntrack --ctstate INVALID -m set --match-set %s %s -j DROP", g.isolated(fam), end)
	}
	for _, end := range []string{"src", "dst"} {
		for _, r := range g.noisyRules(fam, end) {
			add("%s", r)
		}
		add("-m set --match-set %s %s -j NFQUEUE %s", g.isolated(fam), end, g.queueFlags())
	}
	if g.unknown {
		for _, end := range []string{"src", "dst"} {
			for _, r := range g.noisyUnknown(fam, end) {
				add("%s", r)
			}
			add("-m set --match-set %s %s -j NFQUEUE %s", fam.unknown().at(g.slot).name, end, g.queueFlags())
		}
	}
	return rules
}

// queueFlags spreads packets over the queues by the CPU that they are on, whose
// worker is there too (see pin): to wake a thread on another CPU takes as long as
// all else that the queue costs. A pair of pods is so in several workers' caches,
// which is cheap beside that. With --queue-bypass a queue that nobody listens to
// lets everything through.
func (g gate) queueFlags() string {
	flags := fmt.Sprintf("--queue-num %d", g.queueBase)
	if g.queues > 1 {
		flags = fmt.Sprintf("--queue-balance %d:%d", g.queueBase, int(g.queueBase)+g.queues-1)
	}
	if g.failOpen {
		flags += " --queue-bypass"
	}
	if g.queues > 1 {
		flags += " --queue-cpu-fanout"
	}
	return flags
}

// postroutingRules save the accepted bit, which the verdict set on the packet,
// to the connection, and then take it off the packet: an encapsulating device
// gives the outer packet the inner one's mark, and that would be taken for an
// accept of the outer one.
func (g gate) postroutingRules() [][]string {
	a := fmt.Sprintf("0x%x", AcceptedMark(g.markBits))
	return [][]string{
		{"-m", "mark", "--mark", a + "/" + a, "-j", "CONNMARK", "--save-mark", "--nfmask", a, "--ctmask", a},
		{"-m", "mark", "--mark", a + "/" + a, "-j", "MARK", "--set-xmark", "0x0/" + a},
	}
}

// installed is what a family's table held right after the rules were put in
// place, in the kernel's wording.
type installed struct {
	chains map[string][]string // our chains' rules
	jumps  []rule              // the rules that lead to them
}

// install puts the gate's rules in place as a new generation and takes those
// of all others away. Whatever state the table is in, there is no moment in
// which a jump that was there is missing, and none in which a jump leads to a
// chain that isn't complete: the new chains are built first, then the jumps
// to them go in front of the old ones, then the old ones go.
func (c *command) install(g gate) (*installed, error) {
	l, err := c.read(mangle)
	if err != nil {
		return nil, err
	}
	fresh := l.freeGeneration()
	if err := c.build(fresh, g); err != nil {
		return nil, errors.Join(err, c.sweep(func(chain string) bool { return !fresh.holds(chain) }))
	}
	for _, j := range fresh.jumps() {
		if err := c.ipt.Insert(mangle, j.from, 1, j.spec...); err != nil {
			// What is in place is complete, so it stays: rather shut than open.
			return nil, fmt.Errorf("jump from %s to %s chain: %s", j.from, c.fam, oneLine(err))
		}
	}
	if err := c.sweep(fresh.holds); err != nil {
		return nil, err
	}
	return c.record(fresh, g)
}

// build makes a generation's chains, which nothing leads to yet.
func (c *command) build(names chains, g gate) error {
	parts := []struct {
		chain string
		rules [][]string
	}{{names.forward, g.forwardRules(c.fam)}, {names.postrouting, g.postroutingRules()}}
	for _, p := range parts {
		if err := c.ipt.NewChain(mangle, p.chain); err != nil {
			return fmt.Errorf("make %s chain %s: %s", c.fam, p.chain, oneLine(err))
		}
		for _, r := range p.rules {
			if err := c.ipt.Append(mangle, p.chain, r...); err != nil {
				return refusal(r, err)
			}
		}
	}
	return nil
}

// record reads back what install has put in place.
func (c *command) record(names chains, g gate) (*installed, error) {
	l, err := c.read(mangle)
	if err != nil {
		return nil, err
	}
	in := &installed{chains: map[string][]string{
		names.forward:     l.of(names.forward),
		names.postrouting: l.of(names.postrouting),
	}}
	for _, r := range l.rules {
		if names.holds(r.target()) {
			in.jumps = append(in.jumps, r)
		}
	}
	whole := len(in.chains[names.forward]) == len(g.forwardRules(c.fam)) &&
		len(in.chains[names.postrouting]) == len(g.postroutingRules()) &&
		len(in.jumps) == len(names.jumps())
	if !whole {
		return nil, fmt.Errorf("the %s rules of the %s table changed while they were put in place: another program works on them", c.fam, mangle)
	}
	return in, nil
}

// faults compares a listing with what was installed and says in words what is
// wrong: nothing, if it gives nothing. A nil installed finds everything wrong.
func (in *installed) faults(l listing) []string {
	if in == nil {
		return []string{"the rules were not in place"}
	}
	var faults []string
	for _, name := range sortedKeys(in.chains) {
		switch {
		case !l.has(name):
			faults = append(faults, "chain "+name+" was gone")
		case !slices.Equal(l.of(name), in.chains[name]):
			faults = append(faults, "chain "+name+" had been changed")
		}
	}
	for _, j := range in.jumps {
		rules := l.of(j.chain)
		switch {
		case len(rules) > 0 && rules[0] == j.text:
		case slices.Contains(rules, j.text):
			faults = append(faults, "the jump from "+j.chain+" was no longer the first rule")
		default:
			faults = append(faults, "the jump from "+j.chain+" was gone")
		}
	}
	if n := in.strangers(l); n > 0 {
		faults = append(faults, fmt.Sprintf("%d chains or jumps of an earlier run were left over", n))
	}
	return faults
}

// strangers counts chains that are named like ours and jumps to such chains,
// beyond those that were installed.
func (in *installed) strangers(l listing) int {
	n := 0
	for _, name := range l.chains {
		if _, known := in.chains[name]; isOurs(name) && !known {
			n++
		}
	}
	seen := map[rule]bool{}
	for _, r := range l.rules {
		if isOurs(r.chain) || !isOurs(r.target()) {
			continue
		}
		if seen[r] || !slices.Contains(in.jumps, r) {
			n++
		}
		seen[r] = true
	}
	return n
}

// sweep removes every chain of ours that isn't to be kept, and every rule that
// leads to one, from the mangle table. Rules are deleted by their text and not
// by their number, which may be another rule's by then.
func (c *command) sweep(keep func(chain string) bool) error {
	l, err := c.read(mangle)
	if err != nil {
		return err
	}
	stale := func(chain string) bool { return isOurs(chain) && !keep(chain) }
	for _, r := range l.rules {
		if stale(r.chain) || !stale(r.target()) {
			continue
		}
		if err := c.ipt.Delete(mangle, r.chain, r.words()...); err != nil {
			return fmt.Errorf("delete the %s jump from %s: %s", c.fam, r.chain, oneLine(err))
		}
	}
	var gone []string
	for _, name := range l.chains {
		if !stale(name) {
			continue
		}
		// All are emptied before any is deleted, for they may refer to
		// each other.
		if err := c.ipt.ClearChain(mangle, name); err != nil {
			return fmt.Errorf("empty the %s chain %s: %s", c.fam, name, oneLine(err))
		}
		gone = append(gone, name)
	}
	for _, name := range gone {
		if err := c.ipt.DeleteChain(mangle, name); err != nil {
			return fmt.Errorf("delete the %s chain %s: %s", c.fam, name, oneLine(err))
		}
	}
	return nil
}

// keepNone is what sweep keeps when everything is to go.
func keepNone(string) bool { return false }

// sortedKeys gives a map's keys in order.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
