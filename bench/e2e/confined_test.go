package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"portcullis/bench/lab"
)

// TestConfined runs the agent with two capabilities and no others, on a root file
// system that is read-only but for the log's directory, as the DaemonSet does; it
// judges, repairs and ends as ever. (Which of the two is needed for what is
// filter's TestCapabilitiesAreNeeded.)
func TestConfined(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "confined", lab.Routed)
	w.must(w.lab.Manifests(w.dir))
	logs := t.TempDir()
	w.log = filepath.Join(logs, "decisions.log")
	script := fmt.Sprintf(`mount --make-rprivate / && mount -t tmpfs none %[1]s && mount -o remount,bind,ro / &&
exec setpriv --bounding-set -all,+net_admin,+net_raw --inh-caps -all --no-new-privs \
  %[2]s agent --manifests %[3]s --node %[4]s --http %[5]s --decision-log %[6]s --iptables-backend nft`, logs, binary, w.dir, lab.NodeName, httpAddr, w.log)
	p, err := w.lab.Run(context.Background(), lab.Node, "unshare", "-m", "sh", "-c", script)
	w.must(err)
	w.agent = p
	w.until("the agent is ready", func() error {
		_, err := w.get("/readyz")
		return err
	})
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	w.must(err)
	const adminAndRaw = 1<<12 | 1<<13
	for _, set := range []string{"CapEff:", "CapPrm:", "CapBnd:"} {
		_, rest, _ := strings.Cut(string(status), set)
		if caps, err := strconv.ParseUint(strings.Fields(rest)[0], 16, 64); err != nil || caps != adminAndRaw {
			t.Errorf("%s %x (%v), want NET_ADMIN and NET_RAW", set, caps, err)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", p.Pid()))
	w.must(err)
	for l := range strings.Lines(string(mounts)) {
		if f := strings.Fields(l); f[1] == "/" && !strings.HasPrefix(f[3], "ro") {
			t.Errorf("the root isn't read-only: %s", l)
		}
	}
	w.expect(gateJudged)
	w.command("iptables", "-t", "mangle", "-F")
	w.settle(gateJudged)
}

// TestListensNowhereElse looks for what the agent listens to: the metrics' address,
// on loopback, is all there is of TCP, and of UDP and raw sockets there are none.
func TestListensNowhereElse(t *testing.T) {
	t.Parallel()
	w := gateWorld(t, "listens", lab.Routed)
	w.start()
	w.expect(gateJudged)
	for file, want := range map[string]string{"tcp": httpAddr, "tcp6": "", "udp": "", "udp6": "", "raw": "", "raw6": ""} {
		var listening []string
		for l := range strings.Lines(w.command("cat", "/proc/thread-self/net/"+file)) {
			const listen = "0A"
			f := strings.Fields(l)
			if f[0] == "sl" || strings.HasPrefix(file, "tcp") && f[3] != listen {
				continue
			}
			listening = append(listening, procAddr(t, f[1]))
		}
		if got := strings.Join(listening, " "); got != want {
			t.Errorf("%s: somebody listens on %q, want %q", file, got, want)
		}
	}
}

// procAddr reads an IPv4 address and port as /proc/net/tcp writes them; others it
// gives as they are.
func procAddr(t *testing.T, s string) string {
	ip, port, _ := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(ip, 16, 32)
	p, err2 := strconv.ParseUint(port, 16, 16)
	if err1 != nil || err2 != nil {
		return s
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{byte(a), byte(a >> 8), byte(a >> 16), byte(a >> 24)}), uint16(p)).String()
}
