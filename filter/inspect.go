package filter

import (
	"errors"
	"net/netip"
	"slices"
)

// SetState is one of the sets of isolated addresses as the kernel has it.
type SetState struct {
	Name    string
	IPv6    bool
	Members []netip.Addr // sorted
	Err     error        // why they can't be told
}

// errNoSet says that a set isn't there.
var errNoSet = errors.New("the set doesn't exist")

// Sets reads the sets from the kernel. It changes nothing.
func (k *Kernel) Sets() []SetState {
	k.setLock.Lock()
	defer k.setLock.Unlock()
	var all []SetState
	for _, c := range k.commands {
		set := c.fam.isolated().at(k.gate.slot)
		s := SetState{Name: set.name, IPv6: c.fam == 6}
		members, ok, err := readSet(set)
		if s.Err = err; err == nil && !ok {
			s.Err = errNoSet
		}
		for a := range members {
			s.Members = append(s.Members, a)
		}
		slices.SortFunc(s.Members, netip.Addr.Compare)
		all = append(all, s)
	}
	return all
}

// Faults reads the rules and says what is wrong with them now, without mending it: a
// sentence for each thing. It may have to wait for another program's iptables
// command.
func (k *Kernel) Faults() ([]string, error) {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	var faults []string
	var errs []error
	for _, c := range k.commands {
		l, err := c.read(mangle)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, f := range k.installed[c.fam].faults(l) {
			faults = append(faults, c.fam.String()+": "+f)
		}
	}
	return faults, errors.Join(errs...)
}
