package filter

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// affinity runs fn on a thread of its own, which goes with it, and gives the CPUs
// that the thread may use afterwards.
func affinity(t *testing.T, fn func() error) (cpus unix.CPUSet) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := fn()
		if err == nil {
			err = unix.SchedGetaffinity(0, &cpus)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return cpus
}

// Workers share the CPUs that the process may use: each has those whose packets
// the rules give to its queue.
func TestPin(t *testing.T) {
	all := affinity(t, func() error { return nil })
	const n = 2
	var together unix.CPUSet
	for i := range n {
		for cpu, mine := 0, affinity(t, func() error { return pin(i, n) }); cpu < runtime.NumCPU(); cpu++ {
			if mine.IsSet(cpu) {
				together.Set(cpu)
			}
			if mine.IsSet(cpu) && cpu%n != i && all.Count() >= n && all.IsSet(i) {
				t.Errorf("worker %d is on CPU %d", i, cpu)
			}
		}
	}
	if together != all {
		t.Errorf("workers use %v of %v", together, all)
	}
	if got := affinity(t, func() error { return pin(0, 1) }); got != all {
		t.Errorf("a single worker is kept to %v of %v", got, all)
	}
	// A process that may not use any of the queue's CPUs stays where it may be.
	one := unix.CPUSet{}
	for cpu := range len(all) * 64 {
		if all.IsSet(cpu) {
			one.Set(cpu)
			other := (cpu + 1) % 2
			got := affinity(t, func() error {
				if err := unix.SchedSetaffinity(0, &one); err != nil {
					return err
				}
				return pin(other, 2)
			})
			if got != one {
				t.Errorf("confined to CPU %d, a worker is at %v", cpu, got)
			}
			return
		}
	}
}
