package filter

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestParseListing(t *testing.T) {
	l := parseListing("# Warning: legacy tables present\n-P FORWARD ACCEPT\n-N A\n-N B\n-A FORWARD -j A\n-A FORWARD\n-A A -m comment --comment \"a -j \\\"B\\\" b\" -g B\n\n")
	if got := strings.Join(l.chains, " "); got != "FORWARD A B" {
		t.Errorf("chains %q", got)
	}
	for i, want := range []rule{{"FORWARD", "-j A"}, {"FORWARD", ""}, {"A", `-m comment --comment "a -j \"B\" b" -g B`}} {
		if l.rules[i] != want {
			t.Errorf("rule %d is %q, want %q", i, l.rules[i], want)
		}
	}
	for i, want := range []string{"A", "", "B"} {
		if got := l.rules[i].target(); got != want {
			t.Errorf("target of %q is %q, want %q", l.rules[i].text, got, want)
		}
	}
}

// TestListingOfOurs reads queues and mark bits from chains of ours, and from no
// others.
func TestListingOfOurs(t *testing.T) {
	l := parseListing(`-A PORTCULLIS-FWD-1 -m connmark --mark 0x20/0x20 -j DROP
-A PORTCULLIS-FWD-1 -m connmark --mark 0x1/0x1 -j RETURN
-A PORTCULLIS-FWD-1 -m mark --mark 0x400/0x400 -j RETURN
-A PORTCULLIS-FWD-1 -m connmark ! --mark 0x800/0x800 -j RETURN
-A PORTCULLIS-FWD-1 -m connmark --mark nonsense -j RETURN
-A PORTCULLIS-FWD-1 -j NFQUEUE --queue-balance 7:9
-A PORTCULLIS-FWD-1 -j NFQUEUE --queue-num 8
-A PORTCULLIS-FWD-1 -j NFQUEUE --queue-num 70000
-A PORTCULLIS-FWD-1 -j NFQUEUE --queue-num
-A OTHERS -m connmark --mark 0x8/0x8 -j NFQUEUE --queue-num 3
`)
	if got := fmt.Sprint(l.queues()); got != "[7 8 9]" {
		t.Errorf("queues %s", got)
	}
	if got := l.markBits(); got != 0x21 {
		t.Errorf("mark bits 0x%x", got)
	}
}

func TestRuleWords(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{``, ``},
		{`-j A`, `-j|A`},
		{`--comment "two words" -j A`, `--comment|two words|-j|A`},
		{`--comment "a \"b\" \\ c"`, `--comment|a "b" \ c`},
		{`--comment ""  -j A`, `--comment||-j|A`},
		{`--comment "open`, `--comment|open`},
	} {
		if got := strings.Join(rule{text: c.text}.words(), "|"); got != c.want {
			t.Errorf("words of %s: %s, want %s", c.text, got, c.want)
		}
	}
}

// TestChooseBackend sets up signs of use and sees which backend auto takes.
// The plain iptables command of the test is a fake of the given backend.
func TestChooseBackend(t *testing.T) {
	for _, c := range []struct{ name, plain, script, want, why string }{
		{"nothing, plain nft", "nft", "", "nft", "command is"},
		{"nothing, plain legacy", "legacy", "", "legacy", "command is"},
		{"rules in legacy", "nft", "iptables-legacy -A INPUT -i lo", "legacy", "rules"},
		{"rules in nft", "legacy", "iptables-nft -t nat -A POSTROUTING -o lo", "nft", "rules"},
		{"rules in both", "legacy", "iptables-nft -A INPUT -i lo; iptables-legacy -A INPUT -i lo", "legacy", "command is"},
		{"KUBE chains beat rules", "nft", "iptables-nft -A INPUT -i lo; iptables-legacy -t nat -N KUBE-SERVICES", "legacy", "KUBE"},
		{"the hint beats KUBE chains", "nft", "iptables-nft -t nat -N KUBE-SERVICES; iptables-legacy -t mangle -N KUBE-IPTABLES-HINT", "legacy", "hint"},
		{"the hint for IPv6 only", "legacy", "ip6tables-nft -t mangle -N KUBE-IPTABLES-HINT", "nft", "hint"},
		{"our own rules say nothing", "nft", "iptables-legacy -t mangle -N PORTCULLIS-FWD-1; iptables-legacy -t mangle -A FORWARD -j PORTCULLIS-FWD-1; iptables-legacy -t mangle -A PORTCULLIS-FWD-1 -j RETURN", "nft", "command is"},
	} {
		t.Run(c.name, func(t *testing.T) {
			kernelNetns(t)
			kernelPlain(t, c.plain)
			kernelRun(t, c.script)
			got, why, err := chooseBackend("auto")
			if err != nil || got != c.want || !strings.Contains(why, c.why) {
				t.Errorf("chose %q because %q, %v; want %q because of %q", got, why, err, c.want, c.why)
			}
		})
	}
}

func TestChooseBackendAsked(t *testing.T) {
	for _, c := range []struct{ ask, want, err string }{
		{"nft", "nft", ""},
		{"legacy", "legacy", ""},
		{"nftables", "", "give auto, nft or legacy"},
	} {
		got, _, err := chooseBackend(c.ask)
		if got != c.want || (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
			t.Errorf("chooseBackend(%q) = %q, %v", c.ask, got, err)
		}
	}
}

// TestChooseOnlyBackend: where only one backend's commands are there, auto
// takes it; where only the plain ones are, they serve as what they are.
func TestChooseOnlyBackend(t *testing.T) {
	for _, c := range []struct{ links, want string }{
		{"iptables-legacy ip6tables-legacy", "legacy"},
		{"iptables-nft ip6tables-nft", "nft"},
		{"iptables ip6tables", "nft"},
	} {
		t.Run(c.links, func(t *testing.T) {
			kernelNetns(t)
			kernelPathOf(t, c.links)
			k, err := NewKernel(KernelConfig{Backend: "auto", Queues: 1, Log: kernelQuiet()})
			kernelOK(t, err)
			if k.Backend() != c.want {
				t.Errorf("chose %s, want %s", k.Backend(), c.want)
			}
			kernelOK(t, k.Install())
			kernelOK(t, k.Remove())
		})
	}
}

func TestAskedBackendMissing(t *testing.T) {
	kernelNetns(t)
	kernelPathOf(t, "iptables-legacy ip6tables-legacy")
	_, err := NewKernel(KernelConfig{Backend: "nft", Queues: 1, Log: kernelQuiet()})
	if !errors.Is(err, ErrNoIptables) || !strings.Contains(err.Error(), "iptables-nft") {
		t.Errorf("got %v, want that iptables-nft is missing", err)
	}
}

// TestInstallMovesBackend: after a run with the other backend its rules go.
func TestInstallMovesBackend(t *testing.T) {
	for _, c := range [][2]string{{"nft", "legacy"}, {"legacy", "nft"}} {
		t.Run(c[0]+" to "+c[1], func(t *testing.T) {
			kernelNetns(t)
			first, second := kernelNew(t, c[0]), kernelNew(t, c[1])
			kernelOK(t, first.Install())
			kernelOK(t, second.Install())
			if got := kernelTables(t, c[0]); strings.Contains(got, "PORTCULLIS") {
				t.Errorf("left in %s:\n%s", c[0], got)
			}
			if got := kernelTables(t, c[1]); got != kernelWant() {
				t.Errorf("in %s:\n%s", c[1], got)
			}
		})
	}
}
