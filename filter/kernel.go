package filter

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
)

// KernelConfig says what the rules are to be like.
type KernelConfig struct {
	// Backend is the iptables backend: nft, legacy, or auto for the one that
	// the node works with.
	Backend string
	// QueueBase is the first queue's number, Queues their count, at least 1.
	QueueBase uint16
	Queues    int
	// FailOpen lets connections pass while nobody listens to the queues.
	FailOpen bool
	// NoisyRate is how many packets a second of one pod of this node, or from
	// elsewhere to one pod, go to the queues that all share. What is more goes
	// to the noisy queue, number QueueBase+Queues. Zero means that there is none.
	NoisyRate int
	// MarkBits are exactly two bits; see AcceptedMark and RevokedMark. Zero
	// means DefaultMarkBits.
	MarkBits uint32
	// HoldUnknown queues the packets of unknown pods too: see WatchUnknown.
	HoldUnknown bool
	// Log is where choices and repairs are told; nil means slog's default.
	Log *slog.Logger
}

// Kernel is what Portcullis keeps in the kernel: rules in the mangle table and
// the sets of isolated addresses, in the network namespace of the calling
// thread. Its methods may be called from several goroutines.
type Kernel struct {
	log      *slog.Logger
	gate     gate
	backend  string
	commands []*command // one per family that the kernel has

	// Sets are never kept waiting by rules: an iptables command may have to
	// wait long for the lock that they share with other programs' commands.
	// Who needs both locks takes that of the rules first.
	ruleLock  sync.Mutex
	installed map[family]*installed
	place     place  // beside other agents
	faultless uint32 // the nf_tables ruleset in which no fault was found; 0 for none

	setLock  sync.Mutex
	isolated map[netip.Addr]bool // nil as long as it isn't known
	// isolatedOf is how many of them each family has.
	isolatedOf map[family]int
	unknown    unknownPods
	pods       map[netip.Addr]bool // as isolated
	setsErr    error               // of the last attempt to bring the sets up to date
}

// NewKernel checks that the machine has what the rules need, and chooses the
// backend. It changes nothing. Errors wrap ErrNoNetAdmin, ErrNoIptables,
// ErrNoNFQueue or ErrNoIpset where one of them is the cause.
func NewKernel(cfg KernelConfig) (*Kernel, error) {
	if cfg.MarkBits == 0 {
		cfg.MarkBits = DefaultMarkBits
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if err := checkMarkBits(cfg.MarkBits); err != nil {
		return nil, err
	}
	if span := QueueSpan(cfg.Queues, cfg.NoisyRate); cfg.Queues < 1 || int(cfg.QueueBase)+2*span-1 > LastQueue {
		return nil, fmt.Errorf("queues from %d, twice %d of them, are not within 0 to %d: give a lower base or fewer", cfg.QueueBase, span, LastQueue)
	}
	if err := checkCapabilities(); err != nil {
		return nil, err
	}
	backend, why, err := chooseBackend(cfg.Backend)
	if err != nil {
		return nil, err
	}
	if err := checkIpset(); err != nil {
		return nil, err
	}
	k := &Kernel{
		log:       cfg.Log,
		gate:      gate{queueBase: cfg.QueueBase, queues: cfg.Queues, failOpen: cfg.FailOpen, markBits: cfg.MarkBits, unknown: cfg.HoldUnknown, noisyRate: cfg.NoisyRate},
		unknown:   unknownPods{on: cfg.HoldUnknown, stale: true},
		backend:   backend,
		installed: map[family]*installed{},
	}
	if err := k.findCommands(); err != nil {
		return nil, err
	}
	rehearsed, err := rehearse(k.commands, k.gate)
	if k.doWithoutNoisy(err) {
		rehearsed, err = rehearse(k.commands, k.gate)
	}
	if err != nil {
		return nil, err
	}
	k.log.Info("iptables backend chosen", "backend", backend, "why", why, "rehearsed", rehearsed)
	if rivals := markRivals(cfg.MarkBits); len(rivals) > 0 {
		k.log.Warn("mark bits are also used by others: choose free ones with --mark-bits if they run here",
			"bits", fmt.Sprintf("0x%x", cfg.MarkBits), "used_by", strings.Join(rivals, ", "))
	}
	return k, nil
}

func (k *Kernel) findCommands() error {
	families := []family{4, 6}
	if !hasIPv6() {
		families = families[:1]
		k.log.Info("the kernel has no IPv6: enforcing IPv4 only")
	}
	for _, fam := range families {
		c, err := findCommand(fam, k.backend)
		if err != nil {
			return err
		}
		k.commands = append(k.commands, c)
	}
	return nil
}

// Backend gives the iptables backend in use: nft or legacy.
func (k *Kernel) Backend() string { return k.backend }

// SetIsolated makes the sets hold exactly these addresses: those of the local
// isolated pods. The sets are made if they are missing, and changed by
// difference only. After an error some address may be missing from its set,
// which means that its pod isn't enforced; Repair tries again.
func (k *Kernel) SetIsolated(addrs []netip.Addr) error {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	k.isolated = addrSet(addrs)
	k.isolatedOf = map[family]int{}
	for a := range k.isolated {
		for _, fam := range []family{4, 6} {
			if fam.holds(a) {
				k.isolatedOf[fam]++
			}
		}
	}
	k.takeUnknown()
	changes, err := k.fillSets()
	if len(changes) > 0 {
		k.log.Debug("sets of isolated addresses changed", "changes", strings.Join(changes, "; "))
	}
	return err
}

// SetsError gives what keeps the sets from being right: the error of the last
// SetIsolated, Install or Repair that concerned them, nil if they are right.
func (k *Kernel) SetsError() error {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	return k.setsErr
}

// SetMembers tells of each set how many addresses it is kept to.
func (k *Kernel) SetMembers() map[string]int {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	members := map[string]int{}
	for _, c := range k.commands {
		members[c.fam.set()] = k.isolatedOf[c.fam]
	}
	return members
}

// checkSets is fillSets for those who don't hold the lock.
func (k *Kernel) checkSets() (changes []string, err error) {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	k.lookAround()
	return k.fillSets()
}

// fillSets brings the sets up to date and says in words what it did. The caller
// holds setLock.
func (k *Kernel) fillSets() (changes []string, err error) {
	defer func() { k.setsErr = err }()
	var errs []error
	for _, c := range k.commands {
		slot := k.gate.slot
		unknown, made, err := k.unknown.fill(c.fam.unknown().at(slot))
		errs = append(errs, err)
		if made {
			changes = append(changes, fmt.Sprintf("%s: set %s was missing", c.fam, c.fam.unknown().at(slot).name))
		}
		if k.isolated != nil {
			errs = append(errs, unknown.shut())
		}
		filled, err := fillOne(c.fam.isolated().at(slot), k.isolated)
		changes, errs = append(changes, filled...), append(errs, err)
		if k.isolated != nil {
			errs = append(errs, unknown.open())
			changes = append(changes, unknown.changes()...)
		}
		if k.gate.noisyRate > 0 {
			filled, err := fillOne(c.fam.pods().at(slot), k.pods)
			changes, errs = append(changes, filled...), append(errs, err)
		}
	}
	err = errors.Join(errs...)
	k.unknown.stale = err != nil || k.isolated == nil
	return changes, err
}

// fillOne makes a set if it is missing, and has it hold the wanted members of its
// family. As long as those aren't known (nil), it leaves the members that it has.
func fillOne(s memberSet, members map[netip.Addr]bool) (changes []string, err error) {
	made, err := ensureSet(s)
	if err != nil {
		return nil, err
	}
	if made {
		changes = append(changes, fmt.Sprintf("%s: set %s was missing", s.fam, s.name))
	}
	if members == nil {
		return changes, nil
	}
	want := map[netip.Addr]bool{}
	for a := range members {
		if s.fam.holds(a) {
			want[a] = true
		}
	}
	added, removed, err := fillSet(s, want)
	if added+removed > 0 {
		changes = append(changes, fmt.Sprintf("%s: set %s lacked %d members and had %d too many", s.fam, s.name, added, removed))
	}
	return changes, err
}

// Install puts the rules in place, from whatever state an earlier run, a crash
// or another program left them in, without a moment in which a gate that was
// shut is open. Rules in the other backend go once the new ones are in place.
// It may be called again. Sets that are missing are made; call SetIsolated
// first, so that they hold who is to be isolated.
func (k *Kernel) Install() error {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	unlock, err := lockAgents()
	if err != nil {
		return err
	}
	defer unlock()
	// A rule can't refer to a set that doesn't exist.
	if _, err := k.checkSets(); err != nil {
		return err
	}
	if err := k.clearOldMarks(); err != nil {
		return err
	}
	return k.installAll()
}

// installAll is Install's last step. The caller holds ruleLock.
func (k *Kernel) installAll() error {
	var errs []error
	for _, c := range k.commands {
		in, err := c.install(k.gate)
		if k.doWithoutNoisy(err) {
			return k.installAll()
		}
		k.installed[c.fam] = in
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := sweepBackend(otherBackend(k.backend)); err != nil {
		return err
	}
	return k.place.own()
}

// checkUnattended gives an error if a process listens to a queue that these rules
// lead to.
func (l listing) checkUnattended() error {
	for _, queue := range l.queues() {
		if owner, bound := queueOwner(queue); bound {
			return fmt.Errorf("queue %d, which the rules in place lead to, is already bound by another process (netlink port %d): another agent on this node? stop it first", queue, owner)
		}
	}
	return nil
}

// clearOldMarks takes off connections the mark bits of rules that are in place
// with other bits than this Kernel's: what meant accepted there might mean
// revoked here, or the reverse.
func (k *Kernel) clearOldMarks() error {
	old := inPlace().markBits()
	if old == 0 || old == k.gate.markBits {
		return nil
	}
	cleared, err := clearConnmarks(old)
	k.log.Debug("marks of other bits cleared", "bits", fmt.Sprintf("0x%x", old), "connections", cleared)
	return err
}

// Repair compares sets and rules with what they should be and mends what
// isn't, again without opening the gate any further; it logs and gives one
// sentence for each thing that was wrong. If nothing is, it only reads; and where
// the kernel tells that nobody has changed any rule since, it doesn't even read them,
// which takes iptables commands.
func (k *Kernel) Repair() (repaired []string, err error) {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	unlock, err := k.place.lockOwned()
	if err != nil {
		return nil, err
	}
	defer unlock()
	k.place.sweepSets()
	repaired, err = k.checkSets()
	errs := []error{err}
	// Asked for before the rules are read: what changes in between has the next look
	// read again.
	ruleset := k.ruleset()
	if ruleset == 0 || ruleset != k.faultless {
		k.faultless = 0
		mended, err := k.checkRules()
		if err == nil && len(mended) == 0 {
			k.faultless = ruleset
		}
		repaired, errs = append(repaired, mended...), append(errs, err)
	}
	if len(repaired) > 0 {
		k.log.Warn("kernel state repaired", "repaired", strings.Join(repaired, "; "))
	}
	return repaired, errors.Join(errs...)
}

// ruleset gives the number of the ruleset in force, 0 where there is none: legacy
// iptables doesn't count.
func (k *Kernel) ruleset() uint32 {
	if k.backend != backendNFT {
		return 0
	}
	n, err := nftGeneration()
	if err != nil {
		k.log.Debug("the rules are read, since it isn't known whether they have changed", "err", err)
	}
	return n
}

// checkRules mends the rules, and says in words what was wrong. The caller holds
// ruleLock.
func (k *Kernel) checkRules() (repaired []string, err error) {
	var errs []error
	for _, c := range k.commands {
		l, err := c.read(mangle)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		faults := k.installed[c.fam].faults(l)
		if len(faults) == 0 {
			continue
		}
		in, err := c.install(k.gate)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %s, and it can't be mended: %w", c.fam, strings.Join(faults, ", "), err))
			continue
		}
		k.installed[c.fam] = in
		for _, f := range faults {
			repaired = append(repaired, c.fam.String()+": "+f)
		}
	}
	return repaired, errors.Join(errs...)
}

// Remove opens the gate: rules, sets and the marks on live connections go, of
// both backends. A later Install or Repair puts the rules in place again. The
// error is ErrSuperseded, and nothing is removed, if another agent owns them now.
func (k *Kernel) Remove() error {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	unlock, err := k.place.lockOwned()
	if err != nil {
		return err
	}
	defer unlock()
	k.installed = map[family]*installed{}
	k.installed, k.faultless = map[family]*installed{}, 0
	return removeAll(k.log, k.gate.markBits|inPlace().markBits())
}
