package filter

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const kernelWant4 = `-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P FORWARD ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N PORTCULLIS-FWD-1
-N PORTCULLIS-POST-1
-A FORWARD -j PORTCULLIS-FWD-1
-A OUTPUT -m addrtype ! --src-type LOCAL -j PORTCULLIS-FWD-1
-A POSTROUTING -j PORTCULLIS-POST-1
-A PORTCULLIS-FWD-1 -m connmark --mark 0x2000/0x2000 -j DROP
-A PORTCULLIS-FWD-1 -m conntrack --ctstate RELATED,ESTABLISHED -j RETURN
-A PORTCULLIS-FWD-1 -m connmark --mark 0x1000/0x1000 -j RETURN
-A PORTCULLIS-FWD-1 -m mark --mark 0x1000/0x1000 -j RETURN
-A PORTCULLIS-FWD-1 -m addrtype --src-type LOCAL -m set --match-set portcullis-4 dst -j DROP
-A PORTCULLIS-FWD-1 -m conntrack --ctstate INVALID -m set --match-set portcullis-4 src -j DROP
-A PORTCULLIS-FWD-1 -m conntrack --ctstate INVALID -m set --match-set portcullis-4 dst -j DROP
-A PORTCULLIS-FWD-1 -m set --match-set portcullis-4 src -j NFQUEUE --queue-balance 100:103 --queue-cpu-fanout
-A PORTCULLIS-FWD-1 -m set --match-set portcullis-4 dst -j NFQUEUE --queue-balance 100:103 --queue-cpu-fanout
-A PORTCULLIS-POST-1 -m mark --mark 0x1000/0x1000 -j CONNMARK --save-mark --nfmask 0x1000 --ctmask 0x1000
-A PORTCULLIS-POST-1 -m mark --mark 0x1000/0x1000 -j MARK --set-xmark 0x0/0x1000
`

// kernelWant gives both families' tables as a first installation leaves them.
func kernelWant() string {
	discovery := "-A PORTCULLIS-FWD-1 -p ipv6-icmp -m icmp6 --icmpv6-type 13N -m hl --hl-eq 255 -j RETURN\n"
	var all string
	for _, n := range []string{"3", "4", "5", "6", "7"} {
		all += strings.Replace(discovery, "N", n, 1)
	}
	first := "-A PORTCULLIS-FWD-1 -m connmark --mark 0x2000"
	want6 := strings.Replace(strings.ReplaceAll(kernelWant4, "portcullis-4", "portcullis-6"), first, all+first, 1)
	return kernelWant4 + "---\n" + want6
}

func TestInstallText(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		k := kernelNew(t, backend)
		if got := kernelTables(t, backend); strings.Contains(got, "PORTCULLIS") {
			t.Fatalf("NewKernel changed the tables:\n%s", got)
		}
		if got := kernelRun(t, "ipset list -n"); got != "" {
			t.Fatalf("NewKernel made sets: %s", got)
		}
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
		if got := kernelTables(t, backend); got != kernelWant() {
			t.Errorf("tables are\n%s\nwant\n%s", got, kernelWant())
		}
	})
}

// TestRulesByConfig looks at the rules' words for settings other than the usual.
func TestRulesByConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		gate gate
		want string
	}{
		{"one queue", gate{7, 1, false, 0x3000, 0}, "NFQUEUE --queue-num 7"},
		{"one queue, fail-open", gate{7, 1, true, 0x3000, 0}, "NFQUEUE --queue-num 7 --queue-bypass"},
		{"four queues, fail-open", gate{7, 4, true, 0x3000, 0}, "NFQUEUE --queue-balance 7:10 --queue-bypass --queue-cpu-fanout"},
		{"other accepted mark", gate{7, 1, false, 0x80000001, 0}, "connmark --mark 0x1/0x1 -j RETURN"},
		{"other revoked mark", gate{7, 1, false, 0x80000001, 0}, "connmark --mark 0x80000000/0x80000000 -j DROP"},
	} {
		var text []string
		for _, r := range c.gate.forwardRules(4) {
			text = append(text, strings.Join(r, " "))
		}
		if all := strings.Join(text, "\n") + "\n"; !strings.Contains(all, c.want+"\n") {
			t.Errorf("%s: no %q in\n%s", c.name, c.want, all)
		}
	}
	if s := (gate{7, 4, false, 0x3000, 0}).queueFlags(); strings.Contains(s, "bypass") {
		t.Errorf("fail-closed, but %q", s)
	}
}

// TestRuleCountIsFixed: 500 pods take as many rules as none.
func TestRuleCountIsFixed(t *testing.T) {
	kernelNetns(t)
	k := kernelNew(t, backendNFT)
	kernelOK(t, k.SetIsolated(kernelMany(500)))
	kernelOK(t, k.Install())
	if got := kernelTables(t, backendNFT); got != kernelWant() {
		t.Errorf("with 500 pods the tables are\n%s", got)
	}
}

// kernelBreaks are the states that a crash, an earlier version or another
// program may leave the table in. A rule of somebody else's is in FORWARD all
// the while. GEN is the generation in place. Where shut is false the break
// itself opens the gate.
var kernelBreaks = []struct {
	name, script string
	shut         bool
	want         string // what Repair says of it
	both         bool   // tried in both families and backends, with Install and Repair
}{
	{"nothing", "", true, "", true},
	{"half-built chain", "IPT -N PORTCULLIS-FWD-9; IPT -A PORTCULLIS-FWD-9 -j RETURN; IPT -N PORTCULLIS-FWD-1 || IPT -N PORTCULLIS-FWD-2", true, "left over", false},
	{"crash in mid-switch", "IPT -N PORTCULLIS-FWD-8; IPT -I FORWARD -j PORTCULLIS-FWD-8", true, "no longer the first", true},
	{"earlier version", `IPT -N PORTCULLIS-OLD; IPT -N PORTCULLIS-OLD2; IPT -A PORTCULLIS-OLD -j PORTCULLIS-OLD2; IPT -A PREROUTING -m comment --comment 'an "old" one\' -g PORTCULLIS-OLD; IPT -A PREROUTING -i lo -j PORTCULLIS-FWD-GEN`, true, "left over", false},
	{"two jumps", "IPT -A FORWARD -j PORTCULLIS-FWD-GEN", true, "left over", false},
	{"not the first", "IPT -I FORWARD -m mark --mark 0x7 -j ACCEPT", true, "no longer the first", false},
	{"rule added", "IPT -A PORTCULLIS-FWD-GEN -j RETURN", true, "had been changed", false},
	{"saving gone", "IPT -D POSTROUTING -j PORTCULLIS-POST-GEN", true, "jump from POSTROUTING was gone", false},
	{"other settings", "IPT -R PORTCULLIS-FWD-GEN LAST -m set --match-set SET dst -j NFQUEUE --queue-num 9", true, "had been changed", false},
	{"jump moved", "IPT -D FORWARD -j PORTCULLIS-FWD-GEN; IPT -A FORWARD -j PORTCULLIS-FWD-GEN", false, "no longer the first", false},
	{"IPVS jump gone", "IPT -D OUTPUT -m addrtype ! --src-type LOCAL -j PORTCULLIS-FWD-GEN", false, "jump from OUTPUT was gone", false},
	{"chain flushed", "IPT -F PORTCULLIS-FWD-GEN", false, "had been changed", false},
	{"table emptied", "IPT -F; IPT -X", false, "was gone", true},
}

// kernelBreak breaks the tables of these families.
func kernelBreak(t *testing.T, backend, script string, fams ...family) {
	t.Helper()
	for _, fam := range fams {
		ipt := fam.binary() + "-" + backend + " -t mangle"
		jump := regexp.MustCompile(`-A FORWARD -j PORTCULLIS-FWD-(\d+)`).FindStringSubmatch(kernelRun(t, ipt+" -S"))
		if jump == nil {
			t.Fatal("no rules in place to break")
		}
		last := map[family]string{4: "8", 6: "13"}[fam]
		kernelRun(t, strings.NewReplacer("IPT", ipt, "GEN", jump[1], "LAST", last, "SET", fam.set()).Replace(script))
	}
}

// kernelRecorder makes every command that changes a table leave the text that
// the table has afterwards in the file whose name it gives.
func kernelRecorder(t *testing.T, backend string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "record")
	kernelFakes(t, backend, strings.ReplaceAll(`
case " $* " in *" -S "*|*" --version "*|*" -C "*) exec REAL "$@";; esac
REAL "$@"; rc=$?
{ echo "== after $*"; REAL -t mangle -S; } >> FILE 2>/dev/null
exit $rc
`, "FILE", file))
	return file
}

// kernelOpen says why a table lets packets by, or "".
func kernelOpen(l listing, jumps ...string) string {
	for _, from := range jumps {
		shut := false
		for _, r := range l.rules {
			if r.chain != from || !strings.HasPrefix(r.target(), "PORTCULLIS-FWD-") {
				continue
			}
			queued := strings.Count(strings.Join(l.of(r.target()), "\n"), "-j NFQUEUE")
			shut = shut || queued == 2
			if queued != 2 && r.target() != "PORTCULLIS-FWD-8" {
				return "a jump from " + from + " to an incomplete chain"
			}
		}
		if !shut {
			return "no jump from " + from + " to a complete chain"
		}
	}
	return ""
}

// TestNoOpenMoment breaks the rules in each way and mends them, by a repair
// and, where the table's state makes a difference, by an installation as after
// a restart. It looks at the table after every single command that was run.
// The legacy backend gets the breaks that differ most, to save time.
func TestNoOpenMoment(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		record := kernelRecorder(t, backend)
		k := kernelNew(t, backend)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
		for i, b := range kernelBreaks {
			for _, way := range []string{"install", "repair"} {
				if !b.both && (way == "install" || backend == backendLegacy) {
					continue
				}
				kernelBoth(t, backend, "IPT -S FORWARD | grep -q theirs || IPT -A FORWARD -m comment --comment theirs")
				fams := []family{4, 6}
				if !b.both {
					fams = fams[i%2:][:1] // in turn; the other family is to be left alone
				}
				kernelBreak(t, backend, b.script, fams...)
				kernelOK(t, os.WriteFile(record, nil, 0o644))
				kernelMend(t, k, way, b.name, b.want, fams...)
				steps := kernelSteps(t, record)
				if b.shut {
					kernelCheckSteps(t, way+" after "+b.name, steps)
				}
				if way == "repair" && b.want == "" && len(steps) > 0 {
					t.Errorf("a repair with nothing to repair ran %s", steps[0][0])
				}
				kernelCheckMended(t, way+" after "+b.name, backend)
			}
		}
	})
}

// kernelMend installs anew or repairs, and checks what a repair says.
func kernelMend(t *testing.T, k *Kernel, way, name, want string, fams ...family) {
	t.Helper()
	if way == "install" {
		kernelOK(t, k.Install())
		return
	}
	said, err := k.Repair()
	kernelOK(t, err)
	text := strings.Join(said, "\n")
	for _, fam := range []family{4, 6} {
		broken := want != "" && slices.Contains(fams, fam)
		if broken && !regexp.MustCompile(fam.String()+": .*"+want).MatchString(text) {
			t.Errorf("repair after %s says %q, want %q of %s", name, said, want, fam)
		}
		if !broken && strings.Contains(text, fam.String()) {
			t.Errorf("repair after %s of %v says %q", name, fams, said)
		}
	}
	if again, err := k.Repair(); err != nil || len(again) > 0 {
		t.Errorf("a second repair after %s says %q, %v", name, again, err)
	}
}

// kernelSteps reads a record: command and table of each step.
func kernelSteps(t *testing.T, record string) (steps [][2]string) {
	t.Helper()
	b, err := os.ReadFile(record)
	kernelOK(t, err)
	for _, part := range strings.Split(string(b), "== ")[1:] {
		cmd, table, _ := strings.Cut(part, "\n")
		steps = append(steps, [2]string{cmd, table})
	}
	return steps
}

func kernelCheckSteps(t *testing.T, name string, steps [][2]string) {
	t.Helper()
	for _, s := range steps {
		if why := kernelOpen(parseListing(s[1]), "FORWARD", "OUTPUT"); why != "" {
			t.Fatalf("%s: %s, %s:\n%s", name, s[0], why, s[1])
		}
	}
}

// kernelCheckMended compares the tables with those of a first installation,
// whatever the generation, and sees that others' rules are still there.
func kernelCheckMended(t *testing.T, name, backend string) {
	t.Helper()
	got := regexp.MustCompile(`(PORTCULLIS-[A-Z]+)-\d+`).ReplaceAllString(kernelTables(t, backend), "$1-1")
	theirs := regexp.MustCompile(`-A FORWARD -m (comment --comment "?theirs"?|mark --mark 0x7 -j ACCEPT)\n`)
	if !strings.Contains(name, "table") && strings.Count(got, "theirs") != 2 {
		t.Errorf("%s: somebody else's rules have gone:\n%s", name, got)
	}
	got = theirs.ReplaceAllString(got, "")
	if sortedLines(got) != sortedLines(kernelWant()) || kernelRulesOnly(got) != kernelRulesOnly(kernelWant()) {
		t.Fatalf("%s: tables are\n%s", name, got)
	}
}
