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

	setLock  sync.Mutex
	isolated map[netip.Addr]bool // nil as long as it isn't known
	unknown  unknownPods
	setsErr  error // of the last attempt to bring the sets up to date
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
	if last := int(cfg.QueueBase) + cfg.Queues - 1; cfg.Queues < 1 || last > 65535 {
		return nil, fmt.Errorf("queues from %d, %d of them, are not within 0 to 65535: give a lower base or fewer", cfg.QueueBase, cfg.Queues)
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
		gate:      gate{cfg.QueueBase, cfg.Queues, cfg.FailOpen, cfg.MarkBits, cfg.HoldUnknown},
		unknown:   unknownPods{on: cfg.HoldUnknown, stale: true},
		backend:   backend,
		installed: map[family]*installed{},
	}
	if err := k.findCommands(); err != nil {
		return nil, err
	}
	rehearsed, err := rehearse(k.commands, k.gate)
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
	k.isolated = make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		k.isolated[a.Unmap().WithZone("")] = true
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
		made, err := ensureSet(c.fam)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if made {
			changes = append(changes, fmt.Sprintf("%s: set %s was missing", c.fam, c.fam.set()))
		}
		unknown, made, err := k.unknown.fill(c.fam)
		errs = append(errs, err)
		if made {
			changes = append(changes, fmt.Sprintf("%s: set %s was missing", c.fam, c.fam.unknownSet()))
		}
		if k.isolated == nil {
			continue
		}
		errs = append(errs, unknown.shut())
		want := map[netip.Addr]bool{}
		for a := range k.isolated {
			if c.fam.holds(a) {
				want[a] = true
			}
		}
		added, removed, err := fillSet(c.fam, want)
		if added+removed > 0 {
			changes = append(changes, fmt.Sprintf("%s: set %s lacked %d members and had %d too many", c.fam, c.fam.set(), added, removed))
		}
		errs = append(errs, err, unknown.open())
		changes = append(changes, unknown.changes()...)
	}
	err = errors.Join(errs...)
	k.unknown.stale = err != nil || k.isolated == nil
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
	// A rule can't refer to a set that doesn't exist.
	if _, err := k.checkSets(); err != nil {
		return err
	}
	if err := k.clearOldMarks(); err != nil {
		return err
	}
	var errs []error
	for _, c := range k.commands {
		in, err := c.install(k.gate)
		k.installed[c.fam] = in
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return sweepBackend(otherBackend(k.backend))
}

// CheckAlone looks whether the rules in place, as another agent would have put
// them, lead to a queue that a process listens to. Two agents would take turns
// in replacing each other's rules and members of sets, and where they don't
// agree who is isolated, the gate would be open half the time. Call it before
// this process listens itself.
func (k *Kernel) CheckAlone() error { return inPlace().checkUnattended() }

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
// sentence for each thing that was wrong. If nothing is, it only reads.
func (k *Kernel) Repair() (repaired []string, err error) {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	repaired, err = k.checkSets()
	errs := []error{err}
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
	if len(repaired) > 0 {
		k.log.Warn("kernel state repaired", "repaired", strings.Join(repaired, "; "))
	}
	return repaired, errors.Join(errs...)
}

// Remove opens the gate: rules, sets and the marks on live connections go, of
// both backends. A later Install or Repair puts the rules in place again.
func (k *Kernel) Remove() error {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	k.installed = map[family]*installed{}
	return removeAll(k.log, k.gate.markBits|inPlace().markBits())
}
