package audit

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"portcullis/verdict"
)

// SchemaVersion is the number of the schema that lines follow. It grows when a
// field goes or changes its meaning; new fields don't change it.
const SchemaVersion = 1

// tally is what a line of the kind "decision" ends with: of how many decisions it
// tells.
type tally struct {
	count  uint64 // of repeats, one or more
	last   int64  // when the last of several was received, in nanoseconds since 1970
	sample int    // one in so many was kept; zero or one if all are
}

// line appends the fields of one JSON object, and remembers what goes with all
// of them.
type line struct {
	b        []byte
	labels   bool
	snapshot *verdict.Snapshot
}

// appendRecord writes a decision, or the first of several repeats of one, as
// deploy/decision-log.schema.json says. The line is complete with its tally.
func appendRecord(b []byte, node string, labels bool, r *Record) []byte {
	f, d := &r.Flow, &r.Decision
	l := line{appendHead(b, "decision", r.Time, node), labels, r.Snapshot}
	l.raw(`,"verdict":"`, r.word(), `","reason":"`, d.Reason.String(), `","directions":`, directions(d),
		`,"protocol":"`, f.Proto.String(), `"`)
	whole := f.Defect == verdict.ReasonNone
	ports := whole && f.Proto.HasPorts()
	l.end(`,"src":`, f.Src, f.SrcPort, ports, d.Src)
	l.end(`,"dst":`, f.Dst, f.DstPort, ports, d.Dst)
	if whole && (f.Proto == verdict.ICMP || f.Proto == verdict.ICMPv6) {
		l.number(`,"icmpType":`, uint64(f.ICMPType))
		l.number(`,"icmpCode":`, uint64(f.ICMPCode))
	}
	l.side(`,"egress":`, &d.Egress, egressTable(d.Src), f.Dst)
	l.side(`,"ingress":`, &d.Ingress, ingressTable(d.Dst), f.Src)
	l.b = strconv.AppendBool(append(l.b, `,"cached":`...), d.Cached)
	l.b = strconv.AppendInt(append(l.b, `,"latencyNs":`...), r.Latency, 10)
	if r.Snapshot != nil {
		l.number(`,"generation":`, r.Snapshot.Generation())
	}
	if r.Observed {
		l.raw(`,"observed":true`)
	}
	return l.b
}

// appendTally ends a line of the kind "decision".
func appendTally(b []byte, t tally) []byte {
	l := line{b: b}
	l.number(`,"count":`, t.count)
	if t.count > 1 {
		l.b = appendTime(append(l.b, `,"lastTime":"`...), t.last)
		l.raw(`"`)
	}
	if t.sample > 1 {
		l.number(`,"sample":`, uint64(t.sample))
	}
	return append(l.b, "}\n"...)
}

// appendMissing writes that decisions are missing from the log.
func appendMissing(b []byte, node string, now time.Time, m missing) []byte {
	l := line{b: appendHead(b, "missing", now.UnixNano(), node)}
	l.number(`,"suppressed":`, m.suppressed)
	l.number(`,"lost":`, m.lost)
	if m.unseen > 0 {
		l.number(`,"unseen":`, m.unseen)
	}
	return append(l.b, "}\n"...)
}

func appendHead(b []byte, kind string, at int64, node string) []byte {
	b = strconv.AppendInt(append(b, `{"schema":`...), SchemaVersion, 10)
	b = append(append(b, `,"kind":"`...), kind...)
	b = appendTime(append(b, `","time":"`...), at)
	return appendString(append(b, `","node":`...), node)
}

func appendTime(b []byte, at int64) []byte {
	return time.Unix(0, at).UTC().AppendFormat(b, time.RFC3339Nano)
}

func (l *line) raw(texts ...string) {
	for _, t := range texts {
		l.b = append(l.b, t...)
	}
}

func (l *line) number(name string, n uint64) {
	l.b = strconv.AppendUint(append(l.b, name...), n, 10)
}

func (l *line) text(name, value string) { l.b = appendString(append(l.b, name...), value) }

// word gives the verdict's word.
func (r *Record) word() string {
	if r.Revoked {
		return "revoked"
	}
	return r.Decision.Verdict.String()
}

func directions(d *verdict.Decision) string {
	switch {
	case d.Egress.Judged && d.Ingress.Judged:
		return `["egress","ingress"]`
	case d.Egress.Judged:
		return `["egress"]`
	case d.Ingress.Judged:
		return `["ingress"]`
	}
	return `[]`
}

// end writes one end of the flow: what is known of it and no more.
func (l *line) end(name string, a netip.Addr, port uint16, ports bool, pod *verdict.Endpoint) {
	l.raw(name, `{"ip":"`)
	if a.IsValid() {
		l.b = a.AppendTo(l.b)
	}
	l.raw(`"`)
	if ports {
		l.number(`,"port":`, uint64(port))
	}
	switch node := l.node(a); {
	case pod != nil:
		l.raw(`,"kind":"pod"`)
		l.text(`,"namespace":`, pod.Namespace)
		l.text(`,"pod":`, pod.Name)
		if pod.Workload != "" {
			l.text(`,"workload":`, pod.Workload)
		}
		if l.labels {
			l.texts(`,"labels":`, pod.Labels)
		}
	case node != "":
		l.raw(`,"kind":"node"`)
		l.text(`,"node":`, node)
	case a.IsValid() && l.snapshot != nil && !l.snapshot.Unknown(a):
		l.raw(`,"kind":"external"`)
	default:
		l.raw(`,"kind":"unknown"`)
	}
	l.raw(`}`)
}

// node gives the name of the node that has the address, "" when none does.
func (l *line) node(a netip.Addr) string {
	if l.snapshot == nil {
		return ""
	}
	return l.snapshot.Node(a)
}

// texts writes a map in the order of its keys.
func (l *line) texts(name string, m map[string]string) {
	l.raw(name, `{`)
	for i, key := range slices.Sorted(maps.Keys(m)) {
		if i > 0 {
			l.raw(`,`)
		}
		l.text("", key)
		l.text(`:`, m[key])
	}
	l.raw(`}`)
}

// side writes one direction, if it was judged: table is the one that isolates
// its pod, and peer the other end's address.
func (l *line) side(name string, s *verdict.Side, table *verdict.Table, peer netip.Addr) {
	if !s.Judged {
		return
	}
	l.raw(name, `{"verdict":"`, s.Verdict.String(), `","isolated":`, strconv.FormatBool(s.Isolated), `,"policies":[`)
	for i, p := range s.Policies() {
		if i > 0 {
			l.raw(`,`)
		}
		l.text("", p)
	}
	l.raw(`]`)
	l.versions(s.Policies())
	if s.AllowedBy() == (verdict.RuleRef{}) {
		l.raw(`,"allowedBy":null}`)
		return
	}
	l.text(`,"allowedBy":{"policy":`, s.AllowedBy().Policy)
	l.b = strconv.AppendInt(append(l.b, `,"rule":`...), int64(s.AllowedBy().Rule), 10)
	if table != nil {
		if block := table.Block(s.AllowedBy(), peer); block.IsValid() {
			l.b = append(block.AppendTo(append(l.b, `,"ipBlock":"`...)), '"')
		}
	}
	l.raw(`}}`)
}

// versions writes the policies' versions, as far as they are known.
func (l *line) versions(policies []string) {
	if l.snapshot == nil {
		return
	}
	known := 0
	for _, p := range policies {
		version := l.snapshot.PolicyVersion(p)
		if version == "" {
			continue
		}
		if known++; known == 1 {
			l.raw(`,"policyVersions":{`)
		} else {
			l.raw(`,`)
		}
		l.text("", p)
		l.text(`:`, version)
	}
	if known > 0 {
		l.raw(`}`)
	}
}

func egressTable(pod *verdict.Endpoint) *verdict.Table {
	if pod == nil {
		return nil
	}
	return pod.Egress
}

func ingressTable(pod *verdict.Endpoint) *verdict.Table {
	if pod == nil {
		return nil
	}
	return pod.Ingress
}

// appendString writes a JSON string. Names of the cluster are plain ASCII, but
// they come from outside: whatever isn't plain goes the slow, safe way, which
// escapes quotes, line ends, broken UTF-8, and all that a terminal obeys instead of
// showing it.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return appendEscaped(b, s)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

// appendEscaped leaves ASCII to package json, which lets DEL, the second set of
// control characters and those that turn the direction of writing stand as they are.
func appendEscaped(b []byte, s string) []byte {
	quoted, _ := json.Marshal(s) // no string makes it fail
	for _, r := range string(quoted) {
		switch {
		case unicode.IsPrint(r):
			b = utf8.AppendRune(b, r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			b = fmt.Appendf(b, `\u%04x\u%04x`, high, low)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return b
}
