package audit

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"time"

	"portcullis/verdict"
)

// appendLine writes a record as one JSON object and a newline. The schema is in
// the package's documentation.
func appendLine(b []byte, node string, r *Record) []byte {
	f, d := &r.Flow, &r.Decision
	b = append(b, `{"time":"`...)
	b = time.Unix(0, r.Time).UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","node":`...)
	b = appendString(b, node)
	b = append(b, `,"verdict":"`...)
	b = append(b, d.Verdict.String()...)
	b = append(b, `","reason":"`...)
	b = append(b, d.Reason.String()...)
	b = append(b, `","directions":`...)
	b = appendDirections(b, d)
	b = append(b, `,"protocol":"`...)
	b = append(b, f.Proto.String()...)
	b = append(b, '"')
	whole := f.Defect == verdict.ReasonNone
	ports := whole && f.Proto.HasPorts()
	b = appendEnd(append(b, `,"src":`...), f.Src, f.SrcPort, ports, d.Src)
	b = appendEnd(append(b, `,"dst":`...), f.Dst, f.DstPort, ports, d.Dst)
	if whole && (f.Proto == verdict.ICMP || f.Proto == verdict.ICMPv6) {
		b = strconv.AppendUint(append(b, `,"icmpType":`...), uint64(f.ICMPType), 10)
		b = strconv.AppendUint(append(b, `,"icmpCode":`...), uint64(f.ICMPCode), 10)
	}
	b = appendSide(b, `,"egress":`, &d.Egress)
	b = appendSide(b, `,"ingress":`, &d.Ingress)
	b = strconv.AppendBool(append(b, `,"cached":`...), d.Cached)
	b = strconv.AppendInt(append(b, `,"latencyNs":`...), r.Latency, 10)
	return append(b, "}\n"...)
}

func appendDirections(b []byte, d *verdict.Decision) []byte {
	switch {
	case d.Egress.Judged && d.Ingress.Judged:
		return append(b, `["egress","ingress"]`...)
	case d.Egress.Judged:
		return append(b, `["egress"]`...)
	case d.Ingress.Judged:
		return append(b, `["ingress"]`...)
	}
	return append(b, `[]`...)
}

// appendEnd writes one end of the flow: what is known of it and no more.
func appendEnd(b []byte, a netip.Addr, port uint16, ports bool, pod *verdict.Endpoint) []byte {
	b = append(b, `{"ip":"`...)
	if a.IsValid() {
		b = a.AppendTo(b)
	}
	b = append(b, '"')
	if ports {
		b = strconv.AppendUint(append(b, `,"port":`...), uint64(port), 10)
	}
	if pod != nil {
		b = appendString(append(b, `,"namespace":`...), pod.Namespace)
		b = appendString(append(b, `,"pod":`...), pod.Name)
	}
	return append(b, '}')
}

// appendSide writes one direction, if it was judged.
func appendSide(b []byte, name string, s *verdict.Side) []byte {
	if !s.Judged {
		return b
	}
	b = append(append(b, name...), `{"verdict":"`...)
	b = append(b, s.Verdict.String()...)
	b = strconv.AppendBool(append(b, `","isolated":`...), s.Isolated)
	b = append(b, `,"policies":[`...)
	for i, p := range s.Policies {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, p)
	}
	b = append(b, `],"allowedBy":`...)
	if s.AllowedBy == (verdict.RuleRef{}) {
		return append(b, `null}`...)
	}
	b = appendString(append(b, `{"policy":`...), s.AllowedBy.Policy)
	b = strconv.AppendInt(append(b, `,"rule":`...), int64(s.AllowedBy.Rule), 10)
	return append(b, `}}`...)
}

// appendString writes a JSON string. Names of the cluster are plain ASCII, but
// they come from outside: whatever isn't plain goes the slow, safe way, which
// escapes quotes, line ends and broken UTF-8.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(s) // no string makes it fail
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
