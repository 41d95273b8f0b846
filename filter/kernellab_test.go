package filter

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// kernelNetns puts the test, and the programs it runs, into a network
// namespace of its own until it ends. The machine's own is never touched.
func kernelNetns(t *testing.T) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Set(home); err != nil {
			t.Errorf("return to the first network namespace: %v", err)
			return // leave the thread locked, so that it ends with the test
		}
		home.Close()
		runtime.UnlockOSThread()
	})
	return kernelNewNetns(t)
}

// kernelNewNetns makes a namespace, with its loopback up, and stays in it.
func kernelNewNetns(t *testing.T) netns.NsHandle {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("make a network namespace (these tests need root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	kernelRun(t, "ip link set lo up")
	return ns
}

// kernelIn runs f in a namespace and comes back.
func kernelIn(t *testing.T, ns netns.NsHandle, f func()) {
	t.Helper()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	if err := netns.Set(ns); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(home); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

// kernelRun runs commands, one a line, and gives their output.
func kernelRun(t *testing.T, script string) string {
	t.Helper()
	out, err := kernelTry(script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// kernelTry is kernelRun for goroutines that aren't the test's own.
func kernelTry(script string) (string, error) {
	cmd := exec.Command("/bin/sh", "-ec", script)
	// Tests change PATH to hide commands from the code, not from scripts.
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":"+kernelPath)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", script, err, out)
	}
	return string(out), nil
}

// kernelPath is PATH as the tests found it.
var kernelPath = os.Getenv("PATH")

// kernelBoth runs a script for both families: IPT and SET stand for the
// iptables command and the set.
func kernelBoth(t *testing.T, backend, script string) {
	t.Helper()
	v4 := strings.NewReplacer("IPT", "iptables-"+backend+" -t mangle", "SET", "portcullis-4")
	v6 := strings.NewReplacer("IPT", "ip6tables-"+backend+" -t mangle", "SET", "portcullis-6")
	kernelRun(t, v4.Replace(script)+"\n"+v6.Replace(script))
}

// kernelEach runs a test with each backend in a namespace of its own.
func kernelEach(t *testing.T, f func(t *testing.T, backend string)) {
	for _, backend := range []string{backendNFT, backendLegacy} {
		t.Run(backend, func(t *testing.T) {
			kernelNetns(t)
			f(t, backend)
		})
	}
}

// kernelNew makes a Kernel with four queues from 100.
func kernelNew(t *testing.T, backend string, change ...func(*KernelConfig)) *Kernel {
	t.Helper()
	cfg := KernelConfig{Backend: backend, QueueBase: 100, Queues: 4, Log: kernelQuiet()}
	for _, c := range change {
		c(&cfg)
	}
	k, err := NewKernel(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func kernelQuiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// kernelLog gives a logger and what was logged so far.
func kernelLog() (*slog.Logger, *bytes.Buffer) {
	var b bytes.Buffer
	return slog.New(slog.NewTextHandler(&b, nil)), &b
}

// kernelOK fails the test on an error.
func kernelOK(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// kernelAddrs reads addresses, separated by spaces.
func kernelAddrs(s string) []netip.Addr {
	var addrs []netip.Addr
	for _, f := range strings.Fields(s) {
		addrs = append(addrs, netip.MustParseAddr(f))
	}
	return addrs
}

// kernelTables gives the mangle tables of both families as iptables prints
// them, without warnings.
func kernelTables(t *testing.T, backend string) string {
	t.Helper()
	out := kernelRun(t, "iptables-"+backend+" -t mangle -S; echo ---; ip6tables-"+backend+" -t mangle -S")
	var lines []string
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// kernelFakes puts scripts in front of both families' commands of a backend in
// PATH. REAL in a script stands for the command that it hides.
func kernelFakes(t *testing.T, backend, script string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables-" + backend, "ip6tables-" + backend} {
		path, err := exec.LookPath(name)
		kernelOK(t, err)
		text := "#!/bin/sh\n" + strings.ReplaceAll(script, "REAL", path)
		kernelOK(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755))
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// kernelThrowaway runs f on a thread that ends with it, in mount and network
// namespaces that end with it too.
func kernelThrowaway(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	var start func()
	start = func() {
		runtime.LockOSThread() // never unlocked: the thread dies
		if unix.Gettid() == unix.Getpid() {
			// The process's first thread wouldn't die. While it is
			// held here, another goroutine gets another thread.
			inner := make(chan struct{})
			go func() { defer close(inner); start() }()
			<-inner
			runtime.UnlockOSThread()
			return
		}
		defer close(done)
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
			t.Errorf("make namespaces (these tests need root): %v", err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Error(err)
			return
		}
		f()
	}
	go start()
	<-done
}

// kernelPod is a pod's network namespace, and its addresses.
type kernelPod struct {
	ns netns.NsHandle
	v4 string
	v6 string
}

// kernelAddPod makes a pod that is routed to from the namespace that the test
// is in, which becomes its gateway.
func kernelAddPod(t *testing.T, name, v4, v6 string) kernelPod {
	t.Helper()
	node, err := netns.Get()
	kernelOK(t, err)
	defer node.Close()
	pod := kernelPod{ns: kernelNewNetns(t), v4: v4, v6: v6}
	kernelOK(t, netns.Set(node))
	kernelOK(t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(pod.ns)),
	}))
	kernelRun(t, strings.NewReplacer("DEV", name, "V4", v4, "V6", v6).Replace(`
		echo 0 > /proc/sys/net/ipv6/conf/DEV/accept_dad
		ip addr add 169.254.1.1/32 dev DEV
		ip addr add fd00:1::1/128 dev DEV nodad
		ip link set DEV up
		ip route add V4/32 dev DEV
		ip -6 route add V6/128 dev DEV
		echo 1 > /proc/sys/net/ipv4/ip_forward
		echo 1 > /proc/sys/net/ipv6/conf/all/forwarding`))
	kernelIn(t, pod.ns, func() {
		kernelRun(t, strings.NewReplacer("V4", v4, "V6", v6).Replace(`
			echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
			ip addr add V4/32 dev eth0
			ip addr add V6/128 dev eth0 nodad
			ip link set eth0 up
			ip route add 169.254.1.1 dev eth0
			ip route add default via 169.254.1.1 dev eth0
			ip -6 route add fd00:1::1 dev eth0
			ip -6 route add default via fd00:1::1 dev eth0`))
	})
	return pod
}

// sortedLines puts a listing's lines into one order: backends list chains
// differently.
func sortedLines(s string) string {
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// kernelRulesOnly drops the chains' declarations from a listing.
func kernelRulesOnly(s string) string {
	var rules []string
	for line := range strings.Lines(s) {
		if strings.HasPrefix(line, "-A") {
			rules = append(rules, line)
		}
	}
	return strings.Join(rules, "")
}

// kernelMany gives n addresses of each family.
func kernelMany(n int) []netip.Addr {
	var addrs []netip.Addr
	v4, v6 := netip.MustParseAddr("10.1.0.0"), netip.MustParseAddr("fd01::")
	for range n {
		v4, v6 = v4.Next(), v6.Next()
		addrs = append(addrs, v4, v6)
	}
	return addrs
}

// kernelPlain makes the plain iptables commands those of a backend.
func kernelPlain(t *testing.T, backend string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		path, err := exec.LookPath(name + "-" + backend)
		kernelOK(t, err)
		kernelOK(t, os.Symlink(path, filepath.Join(dir, name)))
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// kernelPathOf makes PATH hold these commands and no others.
func kernelPathOf(t *testing.T, names string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range strings.Fields(names) {
		path, err := exec.LookPath(name)
		kernelOK(t, err)
		kernelOK(t, os.Symlink(path, filepath.Join(dir, name)))
	}
	t.Setenv("PATH", dir)
}
