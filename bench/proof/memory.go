package proof

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"portcullis/bench/lab"
)

// memory is what a process has of it, in MiB.
type memory struct {
	resident float64 // VmRSS
	peak     float64 // VmHWM
}

// memoryOf reads what a process of the lab has. Those that its command line goes
// through on the way (nice, env) are the same process.
func memoryOf(p *lab.Process) (m memory, err error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return m, err
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		to := map[string]*float64{"VmRSS": &m.resident, "VmHWM": &m.peak}[name]
		if to == nil {
			continue
		}
		if _, err := fmt.Sscanf(strings.TrimSpace(value), "%f kB", to); err != nil {
			return m, fmt.Errorf("%s of process %d: %w", name, p.PID(), err)
		}
		*to /= 1024
	}
	if m.resident == 0 || m.peak == 0 {
		return m, fmt.Errorf("process %d doesn't say how much memory it has", p.PID())
	}
	return m, nil
}
