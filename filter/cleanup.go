package filter

import (
	"errors"
	"fmt"
	"log/slog"
)

// Cleanup removes everything that Portcullis ever put into the kernel from the
// calling thread's network namespace: the rules of both iptables families and
// both backends, the sets, and the mark bits on live connections, which live
// on: those given, and those that the rules in place were made with. Nothing to
// remove is no error, nor is a backend that isn't installed. What can't be
// removed doesn't keep the rest from going. While an agent runs, which would put
// its rules back, nothing is removed and the error says so.
func Cleanup(log *slog.Logger, markBits uint32) error {
	if err := checkMarkBits(markBits); err != nil {
		return err
	}
	if err := checkCapabilities(); err != nil {
		return err
	}
	found := inPlace()
	if err := found.checkUnattended(); err != nil {
		return err
	}
	return removeAll(log, markBits|found.markBits())
}

// removeAll is Cleanup without its questions: the agent that ends may still listen
// itself.
func removeAll(log *slog.Logger, markBits uint32) error {
	// Rules first: a set that a rule refers to can't be destroyed.
	errs := []error{sweepBackend(backendNFT), sweepBackend(backendLegacy)}
	if err := checkIpset(); err != nil {
		log.Debug("no sets to remove", "reason", err)
	} else {
		for _, fam := range []family{4, 6} {
			errs = append(errs, destroySet(fam.isolated()), destroySet(fam.pods()))
		}
	}
	cleared, err := clearConnmarks(markBits)
	errs = append(errs, err)
	log.Debug("marks cleared", "connections", cleared)
	return errors.Join(errs...)
}

// inPlace lists what is in the mangle tables of both families and backends.
// What can't be read is left out: whoever has to change it will complain.
func inPlace() (all listing) {
	for _, backend := range []string{backendNFT, backendLegacy} {
		for _, fam := range []family{4, 6} {
			c, err := findCommand(fam, backend)
			if err != nil || (fam == 6 && !hasIPv6()) {
				continue
			}
			if l, err := c.read(mangle); err == nil {
				all.chains = append(all.chains, l.chains...)
				all.rules = append(all.rules, l.rules...)
			}
		}
	}
	return all
}

// sweepBackend removes our rules of both families from one backend.
func sweepBackend(backend string) error {
	var errs []error
	for _, fam := range []family{4, 6} {
		c, err := findCommand(fam, backend)
		if err != nil || (fam == 6 && !hasIPv6()) {
			continue // no such command or family, so no rules of ours in it
		}
		if err := c.sweep(keepNone); err != nil {
			errs = append(errs, fmt.Errorf("remove rules from the %s backend: %w", backend, err))
		}
	}
	return errors.Join(errs...)
}

func otherBackend(backend string) string {
	if backend == backendNFT {
		return backendLegacy
	}
	return backendNFT
}
