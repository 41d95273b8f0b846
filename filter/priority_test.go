package filter

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Workers keep the priority that the agent was given; a short slice and the last place
// need no capability, and are what the kernel then has on record.
func TestPlaceAmongThreads(t *testing.T) {
	const nice = 3
	for _, row := range []struct {
		name   string
		set    func() error
		policy uint32
		slice  uint64
	}{
		{"as it was", func() error { return nil }, 0, 0},
		{"promptly", promptly, 0, uint64(workerSlice)},
		{"last of all", lastOfAll, schedIdle, 0},
	} {
		var got *unix.SchedAttr
		affinity(t, func() (err error) { // on a thread that ends
			if err = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), nice); err != nil {
				return err
			}
			if err = dropCapabilities(); err != nil {
				return err
			}
			if err = row.set(); err != nil {
				return err
			}
			got, err = unix.SchedGetAttr(0, 0)
			return err
		})
		if got.Policy != row.policy || got.Nice != nice {
			t.Errorf("%s: policy %d, nice %d", row.name, got.Policy, got.Nice)
		}
		// Kernels before 6.12 have no slices and say 0.
		if row.slice != 0 && got.Runtime != 0 && got.Runtime != row.slice {
			t.Errorf("%s: a slice of %d ns", row.name, got.Runtime)
		}
	}
}

// dropCapabilities takes the calling thread's away.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}
