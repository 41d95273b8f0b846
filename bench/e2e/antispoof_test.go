package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// nodeEnd gives the name of a member's link on the node's side.
func (w *world) nodeEnd(who string) string {
	w.Helper()
	own, err := w.lab.Command(w.Context(), who, "ip", "-o", "link", "show", "eth0")
	w.must(err)
	_, index, _ := strings.Cut(strings.Fields(own)[1], "@if") // "eth0@if7:"
	for l := range strings.Lines(w.command("ip", "-o", "link")) {
		if f := strings.Fields(l); f[0] == index {
			name, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
			return name
		}
	}
	w.Fatalf("%s has no link on the node's side", who)
	return ""
}

// linkResult writes what a CNI plugin's result for a pod of the lab is, its
// interfaces included.
func (w *world) linkResult(dir, key, uid string) {
	w.Helper()
	namespace, name, _ := strings.Cut(key, "/")
	var ips []string
	for _, ip := range w.lab.IPs(key) {
		ips = append(ips, fmt.Sprintf(`{"address":"%s/%d"}`, ip, ip.BitLen()))
	}
	text := fmt.Sprintf(`{"kind":"cniCacheV1","ifName":"eth0","cniArgs":[["K8S_POD_NAMESPACE",%q],["K8S_POD_NAME",%q],["K8S_POD_UID",%q]],
		"result":{"interfaces":[{"name":"cni0"},{"name":%q},{"name":"eth0","sandbox":"/run/netns/x"}],"ips":[%s]}}`,
		namespace, name, uid, w.nodeEnd(key), strings.Join(ips, ","))
	w.must(os.WriteFile(filepath.Join(dir, "pc-"+namespace+"-"+name+"-eth0"), []byte(text), 0o600))
}

// forge gives a member more addresses and a server on them: those of others, from
// which it then sends.
func (w *world) forge(who string, ips ...netip.Addr) {
	w.Helper()
	for _, ip := range ips {
		_, err := w.lab.Command(w.Context(), who, "ip", "addr", "add", netip.PrefixFrom(ip, ip.BitLen()).String(), "dev", "eth0")
		w.must(err)
	}
}

// forged sends datagrams to a port in the name of an address that the sender has
// taken.
func (w *world) forged(from string, src, to netip.Addr) {
	w.Helper()
	w.must(w.lab.Do(from, func() error {
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 5000)))
		if err != nil {
			return err
		}
		defer c.Close()
		for range 10 { // the first may be lost until neighbours have found each other
			if _, err := c.Write([]byte("x")); err != nil && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EHOSTUNREACH) {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	}))
}

// TestAntiSpoof: a pod that takes the address of one that policy lets in gets no
// further than its own interface with it; without --anti-spoof it is taken for that
// one. Its own addresses work all the while, and so do those of others.
func TestAntiSpoof(t *testing.T) {
	t.Parallel()
	bothModes(t, "spoof", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		results := t.TempDir()
		for _, key := range []string{"a/web", "a/db", "b/free"} {
			w.linkResult(results, key, strings.Replace(key, "/", "-", 1))
		}
		w.apply("udp.yaml", policy("a/udp", `{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5000, protocol: UDP}]}]}`))
		n, err := w.lab.CountUDP("a/db", 5000)
		w.must(err)
		web, db := w.lab.IPs("a/web"), w.lab.IPs("a/db")
		w.start("--cni-results", results)
		w.expect(gateJudged)
		w.forge("b/free", web...)
		for i := range db {
			w.forged("b/free", web[i], db[i])
		}
		w.until("without --anti-spoof a forger is taken for another", func() error {
			if n.Count() < 2 {
				return errNotYet
			}
			return nil
		})

		w.must(w.stop(syscall.SIGTERM))
		w.start("--cni-results", results, "--anti-spoof")
		w.shows("portcullis_spoof_guarded_interfaces 3")
		w.shows("portcullis_spoof_unguarded_pods 0")
		before := n.Count()
		for i := range db {
			w.forged("b/free", web[i], db[i])
		}
		w.until("what is forged is dropped and counted", func() error {
			page, err := w.get("/metrics")
			if err == nil && strings.Contains(page, "portcullis_spoofed_packets_total 0\n") {
				err = errNotYet
			}
			return err
		})
		if after := n.Count(); after != before {
			t.Errorf("%d forged datagrams arrived", after-before)
		}
		for _, ip := range web { // the forger is one no more; web's neighbours may have believed it
			_, err := w.lab.Command(w.Context(), "b/free", "ip", "addr", "del", netip.PrefixFrom(ip, ip.BitLen()).String(), "dev", "eth0")
			w.must(err)
		}
		w.settle(gateJudged)
		w.expect(gateJudged)

		// A pod that comes later is watched from when it is known; one whose interface
		// nobody has named, where it is on a bridge, is not, and that is said.
		w.pod(mode, "b/late", 30, "")
		w.must(w.lab.Manifests(w.dir))
		unguarded := "portcullis_spoof_unguarded_pods 0"
		if mode == lab.Bridged {
			unguarded = "portcullis_spoof_unguarded_pods 1"
		}
		w.shows(unguarded)
		page, err := w.get("/readyz?verbose")
		w.must(err)
		if said := strings.Contains(page, "the interface of b/late isn't known"); said != (mode == lab.Bridged) {
			t.Errorf("said: %v\n%s", said, page)
		}
		w.linkResult(results, "b/late", "b-late")
		w.shows("portcullis_spoof_guarded_interfaces 4")
		w.expect("allow tcp b/late b/free:80\nallow icmp b/late a/web")

		w.must(w.stop(syscall.SIGTERM))
		if tables := w.command("nft", "list", "tables"); !strings.Contains(tables, "portcullis-spoof") {
			t.Errorf("fail-closed, and no table is left: %s", tables)
		}
		w.command(binary, "cleanup")
		if tables := w.command("nft", "list", "tables"); strings.Contains(tables, "portcullis-spoof") {
			t.Errorf("cleanup leaves %s", tables)
		}
		w.start("--cni-results", results, "--anti-spoof")
		w.shows("portcullis_spoof_guarded_interfaces 4")
		w.must(w.stop(syscall.SIGTERM))
		w.start("--cni-results", results)
		if tables := w.command("nft", "list", "tables"); strings.Contains(tables, "portcullis-spoof") {
			t.Errorf("an agent without --anti-spoof leaves %s", tables)
		}
	})
}
