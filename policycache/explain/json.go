package explain

import (
	"encoding/json"
	"io"
	"strconv"

	"portcullis/verdict"
)

// answerLine is an answer in JSON: the question's fields, then the decision.
type answerLine struct {
	From     string          `json:"from"`
	To       string          `json:"to"`
	Protocol string          `json:"protocol"`
	Port     json.RawMessage `json:"port,omitempty"`
	Verdict  string          `json:"verdict"`
	Egress   sideLine        `json:"egress"`
	Ingress  sideLine        `json:"ingress"`
	Reason   string          `json:"reason"`
	Changes  []changeLine    `json:"changes,omitempty"`
}

// sideLine is one direction of an answer. Policies is never null.
type sideLine struct {
	Verdict string `json:"verdict"`
	// NotJudged is set where the end is a pod of another node than the one that was
	// asked: whether it is isolated isn't known there.
	NotJudged bool      `json:"notJudged,omitempty"`
	Isolated  bool      `json:"isolated"`
	Policies  []string  `json:"policies"`
	AllowedBy *ruleLine `json:"allowedBy"`
}

type ruleLine struct {
	Policy string `json:"policy"`
	Rule   int    `json:"rule"`
}

func newSideLine(s *verdict.Side, pod *verdict.Endpoint) sideLine {
	l := sideLine{Verdict: s.Verdict.String(), NotJudged: pod != nil && !s.Judged, Isolated: s.Isolated, Policies: s.Policies()}
	if l.Policies == nil {
		l.Policies = []string{}
	}
	if s.AllowedBy().Policy != "" {
		l.AllowedBy = &ruleLine{s.AllowedBy().Policy, s.AllowedBy().Rule}
	}
	return l
}

// newAnswerLine echoes the question; port is its port in JSON, empty if it
// named none.
func newAnswerLine(a *Answer, port json.RawMessage) answerLine {
	l := answerLine{
		From:     a.Query.From,
		To:       a.Query.To,
		Protocol: a.Query.Protocol,
		Port:     port,
		Verdict:  a.Decision.Verdict.String(),
		Egress:   newSideLine(&a.Decision.Egress, a.Decision.Src),
		Ingress:  newSideLine(&a.Decision.Ingress, a.Decision.Dst),
		Reason:   a.Decision.Reason.String(),
	}
	if l.Protocol == "" {
		l.Protocol = verdict.TCP.String()
	}
	return l
}

// WriteJSON writes one answer as the object that a batch gives for the same
// question, but indented, and with the changes that would admit what is denied.
func (c *Cluster) WriteJSON(w io.Writer, a *Answer) error {
	var port json.RawMessage
	if n, err := strconv.ParseUint(a.Query.Port, 10, 16); err == nil {
		port = strconv.AppendUint(nil, n, 10)
	} else if a.Query.Port != "" {
		port, _ = json.Marshal(a.Query.Port) // a string always marshals
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	l := newAnswerLine(a, port)
	l.Changes = newChangeLines(c.Changes(a))
	return enc.Encode(l)
}
