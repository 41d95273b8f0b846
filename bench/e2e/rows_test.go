package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"

	"portcullis/bench/lab"
)

// row is one connection in one family and what should become of it.
type row struct {
	text  string
	want  lab.Outcome
	probe lab.Probe
}

// rows reads the table of what should happen, one row per line and family.
// Empty lines and what follows a # are passed over.
func (w *world) rows(text string) (all []row) {
	w.Helper()
	for l := range strings.Lines(text) {
		l, _, _ = strings.Cut(l, "#")
		f := strings.Fields(l)
		if len(f) == 0 {
			continue
		}
		if len(f) != 4 {
			w.Fatalf("a row has four words: %q", l)
		}
		all = append(all, w.row(f)...)
	}
	return all
}

var wants = map[string]lab.Outcome{"allow": lab.Connected, "deny": lab.TimedOut, "reach": lab.Refused}

func (w *world) row(f []string) (all []row) {
	w.Helper()
	want, ok := wants[f[0]]
	if !ok {
		w.Fatalf("no such outcome: %q", f[0])
	}
	proto := lab.Proto(strings.ToUpper(strings.TrimRight(f[1], "46")))
	targets, port := w.targets(f[3])
	for _, ip := range targets {
		family := "4"
		if ip.Is6() {
			family = "6"
		}
		if !w.hasFamily(f[2], ip) || !strings.HasSuffix(f[1], family) && strings.TrimRight(f[1], "46") != f[1] {
			continue
		}
		p := lab.Probe{From: f[2], To: ip, Proto: proto, Port: port, Timeout: patient / 2}
		if want == lab.TimedOut {
			p.Timeout = lab.Timeout
		}
		all = append(all, row{strings.Join(f, " ") + " (IPv" + family + ")", want, p})
	}
	if len(all) == 0 {
		w.Fatalf("nothing to try: %v", f)
	}
	return all
}

// targets reads a destination: "name:port" or "ip:port", ICMP's without a port.
func (w *world) targets(s string) ([]netip.Addr, uint16) {
	w.Helper()
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return []netip.Addr{ap.Addr()}, ap.Port()
	}
	name, port, _ := strings.Cut(s, ":")
	n := uint64(0)
	if port != "" {
		var err error
		n, err = strconv.ParseUint(port, 10, 16)
		w.must(err)
	}
	ips := w.lab.IPs(name)
	if ips == nil {
		w.Fatalf("nobody is called %q", name)
	}
	return ips, uint16(n)
}

func (w *world) hasFamily(who string, ip netip.Addr) bool {
	for _, own := range w.lab.IPs(who) {
		if own.Is4() == ip.Is4() {
			return true
		}
	}
	return false
}

// wrong tries all rows at once and tells which came out otherwise.
func (w *world) wrong(rows []row) error {
	probes := make([]lab.Probe, len(rows))
	for i, r := range rows {
		probes[i] = r.probe
	}
	var bad []string
	for i, got := range w.lab.TryAll(probes) {
		if got.Outcome != rows[i].want {
			bad = append(bad, fmt.Sprintf("%s: %s, %v", rows[i].text, got.Outcome, got.Err))
		}
	}
	if bad == nil {
		return nil
	}
	return fmt.Errorf("%d of %d rows are wrong:\n\t%s", len(bad), len(rows), strings.Join(bad, "\n\t"))
}

// expect tries rows once: what is in force must hold for each connection.
func (w *world) expect(text string) {
	w.Helper()
	if err := w.wrong(w.rows(text)); err != nil {
		w.Error(err)
	}
}

// settle tries rows until they hold, as they must soon after a change.
func (w *world) settle(text string) {
	w.Helper()
	rows := w.rows(text)
	quick := make([]row, len(rows))
	for i, r := range rows {
		quick[i] = r
		quick[i].probe.Timeout = lab.Timeout
	}
	w.until("the rows hold", func() error { return w.wrong(quick) })
}

// open tries rows before any policy is there: what will be denied must get
// through now, or its denial would prove nothing.
func (w *world) open(text string) {
	w.Helper()
	rows := w.rows(text)
	for i := range rows {
		if rows[i].want == lab.TimedOut {
			rows[i].want, rows[i].probe.Timeout = lab.Connected, patient/2
		}
	}
	if err := w.wrong(rows); err != nil {
		w.Fatalf("without any policy: %v", err)
	}
}

// agrees asks explain about rows and compares its verdict with what the wire
// should give (and what expect has seen it give).
func (w *world) agrees(rows []row) {
	w.Helper()
	for i, verdict := range w.explained(rows) {
		if want := map[bool]string{true: "allow", false: "deny"}[rows[i].want.Reached()]; verdict != want {
			w.Errorf("%s: explain says %s, the wire %s", rows[i].text, verdict, want)
		}
	}
}

// explained gives explain's verdict on each row.
func (w *world) explained(rows []row) (verdicts []string) {
	w.Helper()
	var in, out, problems bytes.Buffer
	for _, r := range rows {
		from := ""
		for _, ip := range w.lab.IPs(r.probe.From) {
			if ip.Is4() == r.probe.To.Is4() {
				from = ip.String()
			}
		}
		question := map[string]any{"from": from, "to": r.probe.To.String(), "protocol": r.probe.Proto}
		if r.probe.Proto != lab.ICMP {
			question["port"] = r.probe.Port
		}
		w.must(json.NewEncoder(&in).Encode(question))
	}
	cmd := exec.Command(w.explain[0], append(w.explain[1:], "--connections", "-")...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &problems
	if err := cmd.Run(); err != nil {
		w.Fatalf("explain: %v: %s%s", err, problems.String(), out.String())
	}
	for dec := json.NewDecoder(&out); dec.More(); {
		var answer struct{ Verdict string }
		w.must(dec.Decode(&answer))
		verdicts = append(verdicts, answer.Verdict)
	}
	if len(verdicts) != len(rows) {
		w.Fatalf("explain answered %d of %d lines", len(verdicts), len(rows))
	}
	return verdicts
}
