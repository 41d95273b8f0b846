package explain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"portcullis/verdict"
)

func TestAsk(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ query, want string }{
		{"tcp web shop/api 80", "allow not-isolated egress allow, ingress allow"},
		{"tcp web shop/db 5432", "deny no-rule egress allow, ingress deny db,deny"},
		{"TCP fd00::1 shop/db 5432", "allow rule egress allow, ingress allow db,deny by db#1"},
		{"tcp shop/api shop/db 5432", "allow rule egress allow, ingress allow db,deny by db#0"},
		{"- shop/api shop/db postgres", "allow rule egress allow, ingress allow db,deny by db#0"},
		{"udp shop/api shop/db 5432", "deny no-rule egress allow, ingress deny db,deny"},
		{"Udp shop/api shop/db dns", "deny no-rule egress allow, ingress deny db,deny"},
		{"sctp shop/api shop/db 5432", "deny no-rule egress allow, ingress deny db,deny"},
		{"icmp shop/api shop/db -", "deny no-rule egress allow, ingress deny db,deny"},
		{"tcp 203.0.113.9 shop/db 5432", "allow rule egress allow, ingress allow db,deny by db#1"},
		{"tcp 198.51.100.9 10.0.0.2 5432", "deny no-rule egress allow, ingress deny db,deny"},
		{"tcp 198.51.100.9 198.51.100.8 1", "allow not-isolated egress allow, ingress allow"},
		{"tcp tied shop/db 5432", "deny no-rule egress deny tied, ingress deny db,deny"},
		{"tcp tied 198.51.100.9 1", "deny no-rule egress deny tied, ingress allow"},
		{"tcp shop/db shop/db 1", "allow self egress allow, ingress allow db,deny"},
		{"tcp kube-system/proxy shop/db 1", "allow own-node egress allow, ingress allow db,deny"},
		{"tcp shop/six shop/db 5432", "allow rule egress allow, ingress allow db,deny by db#1"},
	} {
		a, err := c.Ask(query(tt.query))
		if err != nil {
			t.Errorf("%s: %v", tt.query, err)
			continue
		}
		d := &a.Decision
		got := fmt.Sprintf("%s %s egress %s, ingress %s", d.Verdict, d.Reason, sideWords(&d.Egress), sideWords(&d.Ingress))
		if got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.query, got, tt.want)
		}
	}
}

// sideWords gives "deny" or "allow db,deny by db#0", without namespaces.
func sideWords(s *verdict.Side) string {
	bare := func(key string) string { return key[strings.Index(key, "/")+1:] }
	words := s.Verdict.String()
	for i, p := range s.Policies() {
		words += string(" ,"[min(i, 1)]) + bare(p)
	}
	if s.AllowedBy().Policy != "" {
		words += fmt.Sprintf(" by %s#%d", bare(s.AllowedBy().Policy), s.AllowedBy().Rule)
	}
	return words
}

func TestFlow(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ query, want string }{
		{"tcp web shop/db 5432", "TCP 10.0.0.1>10.0.0.2 port 5432 icmp 0"},
		{"tcp shop/six shop/db postgres", "TCP fd00::4>fd00::2 port 5432 icmp 0"},
		{"udp web fd00::2 dns", "UDP fd00::1>fd00::2 port 53 icmp 0"},
		{"udp ::ffff:10.0.0.1 ::ffff:10.0.0.2 53", "UDP 10.0.0.1>10.0.0.2 port 53 icmp 0"},
		{"sctp web shop/db 65535", "SCTP 10.0.0.1>10.0.0.2 port 65535 icmp 0"},
		{"icmp web shop/db -", "ICMP 10.0.0.1>10.0.0.2 port 0 icmp 8"},
		{"ICMP web fd00::2 -", "ICMPv6 fd00::1>fd00::2 port 0 icmp 128"},
		{"icmp web shop/db 80", "ICMP 10.0.0.1>10.0.0.2 port 0 icmp 8"},
	} {
		a, err := c.Ask(query(tt.query))
		if err != nil {
			t.Errorf("%s: %v", tt.query, err)
			continue
		}
		f := &a.Flow
		got := fmt.Sprintf("%s %s>%s port %d icmp %d", f.Proto, f.Src, f.Dst, f.DstPort, f.ICMPType)
		if got != tt.want || f.SrcPort != 0 || f.Defect != verdict.ReasonNone {
			t.Errorf("%s:\n got %s\nwant %s", tt.query, got, tt.want)
		}
	}
}

func TestAskErrors(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ query, want string }{
		{"tcp web shop/db -", "TCP needs a port"},
		{"sctp web shop/db -", "SCTP needs a port"},
		{"tcp web shop/db 0", `bad port "0"`},
		{"tcp web shop/db 65536", `bad port "65536"`},
		{"tcp web shop/db -1", `bad port "-1"`},
		{"tcp web shop/db 80-90", `bad port "80-90"`},
		{"gre web shop/db 1", `unknown protocol "gre": want TCP, UDP, SCTP or ICMP`},
		{"tcp web shop/db http", `no TCP port named "http": it has postgres (5432/TCP), dns (53/UDP)`},
		{"udp web shop/db postgres", `no UDP port named "postgres"`},
		{"tcp web shop/api http", `its ports have no names`},
		{"tcp web 203.0.113.9 http", `is no pod, give a number`},
		{"tcp nobody shop/db 1", `from: there is no pod "default/nobody"`},
		{"tcp web shop/nobody 1", `to: there is no pod "shop/nobody"`},
		{"tcp shop/api shop/six 1", "shop/api (10.0.0.3) and shop/six (fd00::4) have no IP family in common"},
		{"tcp 10.0.0.1 fd00::2 1", "have no IP family in common"},
		{"tcp 203.0.113.9 2001:db8::1 1", "203.0.113.9 and 2001:db8::1 have no IP family in common"},
	} {
		_, err := c.AskAll(query(tt.query))
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: error %v, want %q", tt.query, err, tt.want)
		}
	}
}

func TestAskAllFamilies(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ query, want string }{
		{"tcp web shop/db 5432", "10.0.0.2 deny fd00::2 allow"},
		{"tcp 10.0.0.1 shop/db 5432", "10.0.0.2 deny"},
		{"tcp web fd00::2 5432", "fd00::2 allow"},
		{"tcp shop/six shop/db 5432", "fd00::2 allow"},
	} {
		answers, err := c.AskAll(query(tt.query))
		if err != nil {
			t.Errorf("%s: %v", tt.query, err)
		}
		var got []string
		for _, a := range answers {
			got = append(got, a.Flow.Dst.String(), a.Decision.Verdict.String())
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: got %v, want %s", tt.query, got, tt.want)
		}
	}
}

func TestWriteText(t *testing.T) {
	c := testCluster(t)
	var b bytes.Buffer
	for _, text := range []string{
		"tcp web shop/db 5432", "tcp shop/api shop/db postgres", "tcp tied shop/db 80",
		"tcp tied 203.0.113.9 80", "tcp web 2001:db8::1 80", "tcp 203.0.113.9 shop/db 5432",
		"icmp shop/api shop/db -", "icmp web 2001:db8::1 -", "tcp shop/db shop/db 80",
		"udp kube-system/proxy shop/db 53", "tcp web kube-system/proxy 10250", "tcp 192.168.0.1 shop/api 80",
	} {
		answers, err := c.AskAll(query(text))
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		fmt.Fprintf(&b, "? %s\n", text)
		if err := c.WriteText(&b, answers); err != nil {
			t.Fatal(err)
		}
		b.WriteByte('\n')
	}
	golden(t, "text.golden", b.String())
}

// A single answer in JSON is the batch's line for the same question, but for the
// changes.
func TestWriteJSON(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ query, line string }{
		{"tcp web shop/db 5432", `{"from":"web","to":"shop/db","protocol":"tcp","port":5432}`},
		{"- shop/api shop/db postgres", `{"from":"shop/api","to":"shop/db","port":"postgres"}`},
		{"ICMP shop/api shop/db -", `{"from":"shop/api","to":"shop/db","protocol":"ICMP"}`},
		{"UDP tied 203.0.113.9 0053", `{"from":"tied","to":"203.0.113.9","protocol":"UDP","port":53}`},
	} {
		a, err := c.Ask(query(tt.query))
		if err != nil {
			t.Fatal(err)
		}
		var indented, compact, want bytes.Buffer
		if err := c.WriteJSON(&indented, &a); err != nil {
			t.Fatal(err)
		}
		// It has besides what would admit a denied connection.
		text, changes, denied := strings.Cut(strings.TrimSpace(indented.String()), ",\n  \"changes\": ")
		if denied != (a.Decision.Verdict == verdict.Deny) || denied && !strings.Contains(changes, `"op": "add"`) {
			t.Errorf("%s: changes %s", tt.query, changes)
		}
		if err := json.Compact(&compact, []byte(strings.TrimSuffix(text, "\n}")+"}")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Batch(strings.NewReader(tt.line), &want); err != nil {
			t.Fatal(err)
		}
		if compact.String() != strings.TrimSpace(want.String()) || !strings.Contains(indented.String(), "\n  \"verdict\"") {
			t.Errorf("%s:\n got %s\nwant %s", tt.query, indented.String(), want.String())
		}
	}
}
