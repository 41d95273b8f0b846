package policycache_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"

	"portcullis/policycache"
	"portcullis/policycache/manifest"
	"portcullis/policycache/whatif"
	"portcullis/verdict"
)

// TestSuggestReplay holds the round trip of suggest and replay on random
// clusters and traffic: policies suggested by a log deny nothing that the log
// saw allowed, and admit nothing for which the log has no evidence.
func TestSuggestReplay(t *testing.T) {
	admitted, denied := 0, 0
	for seed := *seedFlag; seed < *seedFlag+*clustersFlag/8; seed++ {
		d := newDice(seed)
		o := d.cluster()
		flows := admissible(d.flows(o, 60))
		log := logOf(o, flows)
		suggested := clone(o, false)
		suggested.Policies = suggest(t, o, log)
		report := replayed(t, suggested, log)
		if report.Denied > 0 {
			t.Fatalf("-seed %d: of what was allowed, denied: %+v\n%s", seed, report.Changes, dump(suggested))
		}
		if len(report.NotPlaced) > 0 {
			t.Fatalf("-seed %d: not placed: %v", seed, report.NotPlaced)
		}
		e := evidenceOf(o, flows)
		compiler := policycache.NewCompiler("", quiet)
		next := compiler.Compile(suggested)
		for _, p := range compiler.Problems() {
			if strings.HasPrefix(p.Object, "networkpolicy ") {
				t.Fatalf("-seed %d: %s: %v", seed, p.Object, p.Err)
			}
		}
		for _, f := range append(flows, admissible(d.flows(o, 60))...) {
			a, b := e.check(t, seed, next, f)
			admitted, denied = admitted+a, denied+b
		}
	}
	if admitted < 100 || denied < 100 {
		t.Errorf("%d directions admitted by evidence and %d denied for lack of it: too few to tell", admitted, denied)
	}
}

// TestReplayVersusOracle compares what replay says of a log under other policies
// with the oracle, in the directions that each node judged.
func TestReplayVersusOracle(t *testing.T) {
	changed := uint64(0)
	for seed := *seedFlag; seed < *seedFlag+*clustersFlag/8; seed++ {
		d := newDice(seed)
		o := d.cluster()
		// Of a protocol without ports the log doesn't tell whether a packet that
		// was let pass was whole.
		flows := slices.DeleteFunc(d.flows(o, 60), func(f verdict.Flow) bool {
			return f.Defect != verdict.ReasonNone && (f.Proto == 47 || f.Proto == 0) && f.Src.IsValid()
		})
		next := clone(o, false)
		next.Policies = d.cluster().Policies
		var want whatif.Report
		for _, node := range append([]string{""}, genNodes...) {
			for _, f := range flows {
				if f.Src.IsValid() { // else nobody can judge it again
					count(&want, oracle(o, node, f), oracle(next, "", f))
				}
			}
		}
		got := replayed(t, next, logOf(o, flows))
		if got.Denied != want.Denied || got.Allowed != want.Allowed || got.Unchanged != want.Unchanged {
			t.Fatalf("-seed %d: got %+v, want %+v\n%s", seed, got, want, dump(next))
		}
		changed += got.Denied + got.Allowed
	}
	if changed < 100 {
		t.Errorf("%d connections changed verdict: too few to tell", changed)
	}
}

// count adds a connection that was judged before, and after for all directions.
func count(r *whatif.Report, before, after answer) {
	denied := before.Egress.Judged && after.Egress.Verdict == verdict.Deny || before.Ingress.Judged && after.Ingress.Verdict == verdict.Deny
	switch was := before.Verdict == verdict.Allow; {
	case was != denied:
		r.Unchanged++
	case was:
		r.Denied++
	default:
		r.Allowed++
	}
}

// admissible leaves out what no rule can admit once an end is isolated.
func admissible(flows []verdict.Flow) []verdict.Flow {
	var some []verdict.Flow
	for _, f := range flows {
		if f.Defect == verdict.ReasonNone && !(f.Proto.HasPorts() && f.DstPort == 0) {
			some = append(some, f)
		}
	}
	return some
}

// logOf is the decision log of a cluster's agents, one after the other.
func logOf(o *policycache.Objects, flows []verdict.Flow) []byte {
	var log bytes.Buffer
	for _, node := range append([]string{""}, genNodes...) {
		s := policycache.NewCompiler(node, quiet).Compile(o)
		for i, f := range flows {
			decision := s.Decide(&f)
			line, err := json.Marshal(recordOf(&f, &decision, genEpoch.Add(time.Duration(i)*time.Second)))
			if err != nil {
				panic(err) // a record always marshals
			}
			log.Write(append(line, '\n'))
		}
	}
	return log.Bytes()
}

func recordOf(f *verdict.Flow, d *verdict.Decision, at time.Time) *whatif.Record {
	r := &whatif.Record{Time: at, Protocol: f.Proto.String(), Directions: []string{}}
	r.Verdict, r.Reason = d.Verdict.String(), d.Reason.String()
	side := func(name string, s *verdict.Side) *whatif.Side {
		if !s.Judged {
			return nil
		}
		r.Directions = append(r.Directions, name)
		side := &whatif.Side{Verdict: s.Verdict.String(), Isolated: s.Isolated, Policies: s.Policies()}
		if s.AllowedBy().Policy != "" {
			side.AllowedBy = &whatif.Rule{Policy: s.AllowedBy().Policy, Rule: s.AllowedBy().Rule}
		}
		return side
	}
	r.Egress, r.Ingress = side("egress", &d.Egress), side("ingress", &d.Ingress)
	end := func(a netip.Addr, port *uint16, e *verdict.Endpoint) whatif.RecordEnd {
		end := whatif.RecordEnd{Port: port}
		if a.IsValid() {
			end.IP = a.String()
		}
		if e != nil {
			end.Namespace, end.Pod = e.Namespace, e.Name
		}
		return end
	}
	var srcPort, dstPort *uint16
	whole := f.Defect == verdict.ReasonNone
	if whole && f.Proto.HasPorts() {
		srcPort, dstPort = &f.SrcPort, &f.DstPort
	}
	if whole && (f.Proto == verdict.ICMP || f.Proto == verdict.ICMPv6) {
		r.ICMPType, r.ICMPCode = &f.ICMPType, &f.ICMPCode
	}
	r.Src, r.Dst = end(f.Src, srcPort, d.Src), end(f.Dst, dstPort, d.Dst)
	return r
}

// suggest gives the policies as they are read back from their YAML.
func suggest(t *testing.T, o *policycache.Objects, log []byte) map[string]*networkingv1.NetworkPolicy {
	t.Helper()
	s := whatif.NewSuggest(whatif.NewState(o, ""), whatif.SuggestOptions{Complete: true, Bits4: 32, Bits6: 128})
	read(t, log, s.Add)
	var text bytes.Buffer
	if err := whatif.WriteYAML(&text, s.Policies()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "suggested.yaml")
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	back, err := manifest.Load(path)
	if err != nil {
		t.Fatalf("%v\n%s", err, text.String())
	}
	return back.Policies
}

func replayed(t *testing.T, o *policycache.Objects, log []byte) *whatif.Report {
	t.Helper()
	r := whatif.NewReplay(whatif.NewState(o, ""))
	read(t, log, r.Add)
	return r.Report()
}

func read(t *testing.T, log []byte, use func(*whatif.Record)) {
	t.Helper()
	_, err := whatif.Read(bytes.NewReader(log), use, func(line int, err error) { t.Fatalf("line %d: %v", line, err) })
	if err != nil {
		t.Fatal(err)
	}
}

// evidence is a log's, gathered in a plainer way than suggest does: who was
// judged in which direction, and what was seen allowed.
type evidence struct {
	o      *policycache.Objects
	judged map[string]bool // direction and subject
	seen   map[string]bool // direction, subject, peer, and protocol and port or "any"
}

func evidenceOf(o *policycache.Objects, flows []verdict.Flow) *evidence {
	e := &evidence{o: o, judged: map[string]bool{}, seen: map[string]bool{}}
	for _, f := range flows {
		for _, node := range append([]string{""}, genNodes...) {
			a := oracle(o, node, f)
			for i, side := range []answerSide{a.Egress, a.Ingress} {
				subject, peer := e.ends(f, i)
				if !side.Judged {
					continue
				}
				e.judged[subject] = true
				if a.Verdict == verdict.Allow && oracleExemption(o, oracleOwner(o, f.Src), oracleOwner(o, f.Dst), f) == verdict.ReasonNone {
					e.seen[subject+peer+serviceOf(f)] = true
				}
			}
		}
	}
	return e
}

func serviceOf(f verdict.Flow) string {
	if !f.Proto.HasPorts() {
		return "any"
	}
	return fmt.Sprint(f.Proto, f.DstPort)
}

// ends names the subject of a direction, 0 for egress, and its peer.
func (e *evidence) ends(f verdict.Flow, direction int) (subject, peer string) {
	name := func(a netip.Addr) string {
		if p := oracleOwner(e.o, a); p != nil {
			return fmt.Sprintf(" %s %q", p.Namespace, maps.Clone(p.Labels))
		}
		return " " + a.String()
	}
	if direction == 0 {
		return "egress" + name(f.Src), name(f.Dst)
	}
	return "ingress" + name(f.Dst), name(f.Src)
}

// check holds a flow against the suggested policies and tells how many
// directions were admitted, and how many denied, by policy.
func (e *evidence) check(t *testing.T, seed uint64, s *verdict.Snapshot, f verdict.Flow) (admitted, denied int) {
	d := s.Decide(&f)
	if d.Reason != verdict.ReasonRule && d.Reason != verdict.ReasonNoRule {
		return 0, 0
	}
	for i, side := range []verdict.Side{d.Egress, d.Ingress} {
		subject, peer := e.ends(f, i)
		if side.Isolated != (side.Judged && e.judged[subject]) {
			t.Errorf("-seed %d: %s isolated is %t", seed, subject, side.Isolated)
		}
		seen := e.seen[subject+peer+serviceOf(f)] || e.seen[subject+peer+"any"]
		switch {
		case !side.Isolated:
		case (side.Verdict == verdict.Allow) != seen:
			t.Errorf("-seed %d: %s,%s %s: %s, and seen is %t", seed, subject, peer, serviceOf(f), side.Verdict, seen)
		case seen:
			admitted++
		default:
			denied++
		}
	}
	return admitted, denied
}
