package proof

import (
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is what the figures hold for.
type Machine struct {
	CPU, Kernel, Go, Revision, Load string
	CPUs                            int
}

// ThisMachine asks the system. What it doesn't tell is "unknown".
func ThisMachine(source string) Machine {
	m := Machine{CPU: "unknown", Kernel: "unknown", Revision: "unknown", Load: "unknown", Go: runtime.Version(), CPUs: runtime.NumCPU()}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	describe := exec.Command("git", "describe", "--always", "--dirty")
	describe.Dir = source
	if out, err := describe.Output(); err == nil {
		m.Revision = strings.TrimSpace(string(out))
	}
	return m
}
