package filter

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// pin keeps the calling thread on those CPUs whose packets queue i of n gets: the
// rules give each CPU's packets to the queue of its number modulo n. So a packet
// wakes its worker where it is itself, which spares the other CPU an interrupt, and
// the packet the way there. Where the process may not use any of those CPUs the
// thread stays as it is; a single queue's worker goes wherever it likes.
func pin(i, n int) error {
	if n < 2 {
		return nil
	}
	var allowed, mine unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Errorf("ask for the thread's CPUs: %w", err)
	}
	for cpu := i; cpu < len(allowed)*64; cpu += n {
		if allowed.IsSet(cpu) {
			mine.Set(cpu)
		}
	}
	if mine.Count() == 0 {
		return nil
	}
	if err := unix.SchedSetaffinity(0, &mine); err != nil {
		return fmt.Errorf("keep to the CPUs of the queue: %w", err)
	}
	return nil
}
