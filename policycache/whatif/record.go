package whatif

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"portcullis/policycache/lines"
	"portcullis/verdict"
)

// Record is a line of the decision log, as far as what-if questions look at it.
type Record struct {
	Time time.Time `json:"time"`
	Judgement
	// Directions are those that the node judged: "egress", "ingress".
	Directions []string `json:"directions"`
	// Protocol is a name, or an IP protocol's number.
	Protocol string    `json:"protocol"`
	Src      RecordEnd `json:"src"`
	Dst      RecordEnd `json:"dst"`
	ICMPType *uint8    `json:"icmpType,omitempty"`
	ICMPCode *uint8    `json:"icmpCode,omitempty"`
	// Count is how many connections the record stands for; absent, it is one.
	Count uint64 `json:"count,omitempty"`
	// Observed says that the connection wasn't queued: no policy isolated its ends
	// there, and the agent recorded all connections.
	Observed bool `json:"observed,omitempty"`

	proto    verdict.Protocol
	src, dst netip.Addr // the zero Addr where the packet's couldn't be read
}

// RecordEnd is one end of a record's connection.
type RecordEnd struct {
	IP string `json:"ip"`
	// Port is absent where there is none, or where it couldn't be read.
	Port *uint16 `json:"port,omitempty"`
	// Namespace and Pod are empty where the address was no pod's.
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
}

// Judgement is a verdict and who decided it, in the decision log's form.
type Judgement struct {
	Verdict string `json:"verdict"`
	Reason  string `json:"reason"`
	// Egress and Ingress are nil for a direction that wasn't judged.
	Egress  *Side `json:"egress,omitempty"`
	Ingress *Side `json:"ingress,omitempty"`
}

// Side is one direction of a judgement.
type Side struct {
	Verdict   string   `json:"verdict"`
	Isolated  bool     `json:"isolated"`
	Policies  []string `json:"policies"`
	AllowedBy *Rule    `json:"allowedBy"`
}

// Rule names a rule by its policy ("namespace/name") and its index in the
// policy's ingress or egress list.
type Rule struct {
	Policy string `json:"policy"`
	Rule   int    `json:"rule"`
}

// verdicts are the words that a record's verdict may be, and whether policy
// admitted the connection: would-deny is a denial that wasn't carried out, and
// revoked one that came after the connection was open.
var verdicts = map[string]bool{"allow": true, "deny": false, "would-deny": false, "revoked": false}

// allowed tells whether policy admitted the connection when it was logged.
func (r *Record) allowed() bool { return verdicts[r.Verdict] }

func (r *Record) judged(direction string) bool { return slices.Contains(r.Directions, direction) }

// Read reads a decision log and hands each record to use, which must not keep
// it. A line that is no record goes to complain, with its number counted from
// 1, and the rest goes on. Blank lines are passed over, and so are the agent's own
// messages, which have the same output as the log where both go to a container's.
// missing counts the decisions that the log itself says it lacks. The error is a
// failure to read.
func Read(log io.Reader, use func(*Record), complain func(line int, err error)) (missing uint64, err error) {
	in := bufio.NewReaderSize(log, 64<<10)
	var buf []byte
	for n := 1; ; n++ {
		line, lineErr, readErr := lines.Read(in, buf[:0])
		buf = line
		if lineErr == nil && len(bytes.TrimSpace(line)) > 0 {
			var r Record
			var lacks uint64
			var other bool
			if lacks, other = notADecision(line); other {
				missing += lacks
			} else if lineErr = r.parse(line); lineErr == nil {
				use(&r)
			}
		}
		if lineErr != nil {
			complain(n, lineErr)
		}
		if readErr == io.EOF {
			return missing, nil
		}
		if readErr != nil {
			return missing, fmt.Errorf("reading the log: %w", readErr)
		}
	}
}

// notADecision tells whether a line is about decisions that are missing, and about
// how many, or is one of the agent's own messages as slog writes them.
func notADecision(line []byte) (missing uint64, is bool) {
	var l struct {
		Kind, Level, Msg, Verdict string
		Suppressed, Lost, Unseen  uint64
	}
	// What isn't JSON is a record's complaint.
	if json.Unmarshal(line, &l) != nil || l.Verdict != "" {
		return 0, false
	}
	return l.Suppressed + l.Lost + l.Unseen, l.Kind == "missing" || l.Level != "" && l.Msg != ""
}

// parse reads a line and checks all that judging it needs.
func (r *Record) parse(line []byte) error {
	if err := json.Unmarshal(line, r); err != nil {
		return jsonError(err)
	}
	if _, ok := verdicts[r.Verdict]; !ok {
		return fmt.Errorf("unknown verdict %q", r.Verdict)
	}
	for _, d := range r.Directions {
		if d != egress && d != ingress {
			return fmt.Errorf("unknown direction %q", d)
		}
	}
	if text, bad := r.unprintable(); bad {
		return fmt.Errorf("%q is no name", text)
	}
	r.Count = max(r.Count, 1)
	var err error
	if r.proto, err = parseProtocol(r.Protocol); err != nil {
		return err
	}
	if r.src, err = parseAddr("src", r.Src.IP); err != nil {
		return err
	}
	r.dst, err = parseAddr("dst", r.Dst.IP)
	return err
}

// unprintable finds a name that would do something to a terminal. The agent logs
// none, but a log is a file that anybody may have written.
func (r *Record) unprintable() (text string, found bool) {
	names := []string{r.Reason, r.Src.Namespace, r.Src.Pod, r.Dst.Namespace, r.Dst.Pod}
	for _, s := range []*Side{r.Egress, r.Ingress} {
		if s == nil {
			continue
		}
		names = append(names, s.Policies...)
		if s.AllowedBy != nil {
			names = append(names, s.AllowedBy.Policy)
		}
	}
	for _, name := range names {
		if strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }) {
			return name, true
		}
	}
	return "", false
}

const (
	egress  = "egress"
	ingress = "ingress"
)

func parseProtocol(s string) (verdict.Protocol, error) {
	for _, p := range []verdict.Protocol{verdict.TCP, verdict.UDP, verdict.SCTP, verdict.ICMP, verdict.ICMPv6} {
		if s == p.String() {
			return p, nil
		}
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("unknown protocol %q", s)
	}
	return verdict.Protocol(n), nil
}

func parseAddr(end, s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, fmt.Errorf("%s.ip %q is not an address", end, s)
	}
	return a.Unmap(), nil
}

// jsonError says what is wrong with a line's JSON in the words of one who
// writes JSON, not Go.
func jsonError(err error) error {
	var wrong *json.UnmarshalTypeError
	var when *time.ParseError
	switch {
	case errors.As(err, &wrong) && wrong.Field == "":
		return fmt.Errorf("want a JSON object, got %s", wrong.Value)
	case errors.As(err, &wrong):
		return fmt.Errorf("field %q: a %s is out of place", strings.TrimPrefix(wrong.Field, "Judgement."), wrong.Value)
	case errors.As(err, &when):
		return fmt.Errorf("time %s is not RFC 3339", when.Value)
	}
	return fmt.Errorf("not JSON: %w", err)
}

// whole tells whether the packet could be read to its ports or type.
func (r *Record) whole() bool {
	switch {
	case r.proto.HasPorts():
		return r.Dst.Port != nil
	case r.proto == verdict.ICMP || r.proto == verdict.ICMPv6:
		return r.ICMPType != nil
	}
	return r.defect() == verdict.ReasonNone
}

// defect gives the reason why the packet couldn't be read whole. Where it was
// let pass all the same the log doesn't say; it was malformed in some way.
func (r *Record) defect() verdict.Reason {
	for _, d := range []verdict.Reason{verdict.ReasonTruncated, verdict.ReasonFragment, verdict.ReasonMalformed} {
		if r.Reason == d.String() {
			return d
		}
	}
	return verdict.ReasonNone
}

// flow gives what was judged, with the log's addresses.
func (r *Record) flow() verdict.Flow {
	f := verdict.Flow{Src: r.src, Dst: r.dst, Proto: r.proto}
	if r.Dst.Port != nil {
		f.DstPort = *r.Dst.Port
	}
	if r.ICMPType != nil {
		f.ICMPType = *r.ICMPType
	}
	if r.ICMPCode != nil {
		f.ICMPCode = *r.ICMPCode
	}
	if !r.whole() {
		f.Defect = r.defect()
		if f.Defect == verdict.ReasonNone {
			f.Defect = verdict.ReasonMalformed
		}
	}
	return f
}

// span is the time in which something was seen; zero when that isn't known.
type span struct{ first, last time.Time }

func (s *span) add(t time.Time) {
	if t.IsZero() {
		return
	}
	if s.first.IsZero() || t.Before(s.first) {
		s.first = t
	}
	if t.After(s.last) {
		s.last = t
	}
}

// ends gives both as RFC 3339 in whole seconds, UTC; empty if not known.
func (s *span) ends() (first, last string) {
	if s.first.IsZero() {
		return "", ""
	}
	return s.first.UTC().Format(time.RFC3339), s.last.UTC().Format(time.RFC3339)
}

// String gives the span for a comment.
func (s *span) String() string {
	first, last := s.ends()
	switch first {
	case "":
		return "at unknown times"
	case last:
		return first
	}
	return first + " to " + last
}
