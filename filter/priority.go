package filter

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// schedIdle is SCHED_IDLE of sched(7).
const schedIdle = 5

// workerSlice is the shortest that the kernel takes, and more than a burst of packets
// needs.
const workerSlice = 100 * time.Microsecond

// promptly has the calling thread wait less for a processor when a packet wakes it. It
// asks for a short slice, which needs no capability: a thread that wants little at a
// time has an earlier deadline and may take the place of one in the midst of a longer
// slice (the kernel's sched-eevdf.rst; since Linux 6.12). Before that the kernel
// ignores it. It gets no larger share of the processor.
func promptly() error {
	a, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		return fmt.Errorf("ask for the thread's scheduling: %w", err)
	}
	a.Runtime = uint64(workerSlice)
	return setScheduling(a)
}

// lastOfAll gives the calling thread what all others leave, and has whoever wakes take
// its place at once, which a low priority (nice) doesn't: under that a thread still
// keeps the processor to the end of its slice.
func lastOfAll() error {
	return setScheduling(&unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: schedIdle})
}

func setScheduling(a *unix.SchedAttr) error {
	if err := unix.SchedSetAttr(0, a, 0); err != nil {
		return fmt.Errorf("set the thread's scheduling: %w", err)
	}
	return nil
}
