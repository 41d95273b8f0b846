// Package live is what people watch of decisions as they are made: filters, lines
// of text, the streams of several nodes made one, and top's figures. It reads the
// decision log's form, and does no I/O of its own.
package live

import (
	"encoding/json"
	"fmt"
	"time"
)

// Record is a line of the decision log, as far as people look at it.
type Record struct {
	// Line is the whole line, without its end.
	Line []byte `json:"-"`

	Kind       string    `json:"kind"`
	Time       time.Time `json:"time"`
	Node       string    `json:"node"`
	Verdict    string    `json:"verdict"`
	Reason     string    `json:"reason"`
	Directions []string  `json:"directions"`
	Protocol   string    `json:"protocol"`
	Src        End       `json:"src"`
	Dst        End       `json:"dst"`
	ICMPType   *uint8    `json:"icmpType"`
	// Egress and Ingress are nil for a direction that wasn't judged.
	Egress  *Side `json:"egress"`
	Ingress *Side `json:"ingress"`
	// Suppressed and Lost are of the kind "missing".
	Suppressed uint64 `json:"suppressed"`
	Lost       uint64 `json:"lost"`
}

// End is one end of a record's connection.
type End struct {
	IP   string  `json:"ip"`
	Port *uint16 `json:"port"`
	Kind string  `json:"kind"`
	// Namespace, Pod and Workload are empty where the address is no pod's.
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Workload  string `json:"workload"`
	Node      string `json:"node"`
}

// Side is one direction of a judgement.
type Side struct {
	Verdict   string   `json:"verdict"`
	Isolated  bool     `json:"isolated"`
	Policies  []string `json:"policies"`
	AllowedBy *struct {
		Policy string `json:"policy"`
		Rule   int    `json:"rule"`
	} `json:"allowedBy"`
}

// Missing tells whether the line counts decisions that aren't there.
func (r *Record) Missing() bool { return r.Kind == "missing" }

// Parse reads a line, which becomes the record's.
func Parse(line []byte) (*Record, error) {
	r := &Record{Line: line}
	if err := json.Unmarshal(line, r); err != nil {
		return nil, fmt.Errorf("not a decision: %w", err)
	}
	if r.Kind != "decision" && !r.Missing() {
		return nil, fmt.Errorf("not a decision: kind %q", r.Kind)
	}
	return r, nil
}
