package explain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"portcullis/policycache"
)

func TestMatrixText(t *testing.T) {
	c := testCluster(t)
	var b bytes.Buffer
	for _, tt := range []struct{ protocol, port, namespace string }{
		{"TCP", "5432", ""}, {"tcp", "postgres", "shop"}, {"icmp", "", "default"}, {"udp", "1", "empty"},
	} {
		m, err := c.Matrix(tt.protocol, tt.port, tt.namespace)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.WriteText(&b); err != nil {
			t.Fatal(err)
		}
		b.WriteByte('\n')
	}
	golden(t, "matrix.golden", b.String())
}

// Each cell says what Ask says of the same two pods.
func TestMatrixAgreesWithAsk(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct {
		protocol, port, namespace string
		pods                      int
	}{
		{"TCP", "5432", "", 6}, {"TCP", "postgres", "", 6}, {"UDP", "dns", "shop", 3}, {"ICMP", "", "default", 2}, {"TCP", "1", "empty", 0},
	} {
		m, err := c.Matrix(tt.protocol, tt.port, tt.namespace)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := m.WriteJSON(&out); err != nil {
			t.Fatal(err)
		}
		var got struct {
			Protocol string
			Port     any
			Pods     []string
			Rows     []matrixRow
		}
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("%s: %v", out.String(), err)
		}
		port := got.Port
		if port == nil {
			port = ""
		}
		if got.Protocol != tt.protocol || fmt.Sprint(port) != tt.port || got.Pods == nil || got.Rows == nil {
			t.Errorf("%+v: head is %s %v %v", tt, got.Protocol, got.Port, got.Pods)
		}
		if len(got.Pods) != tt.pods || len(got.Rows) != tt.pods*tt.pods {
			t.Errorf("%+v: %d pods, %d rows", tt, len(got.Pods), len(got.Rows))
		}
		for i, row := range got.Rows {
			if row.From != got.Pods[i/tt.pods] || row.To != got.Pods[i%tt.pods] {
				t.Errorf("row %d is %s to %s", i, row.From, row.To)
			}
			want := matrixRow{From: row.From, To: row.To}
			if a, err := c.Ask(Query{From: row.From, To: row.To, Protocol: tt.protocol, Port: tt.port}); err != nil {
				want.Error = err.Error()
			} else {
				want.Verdict, want.Reason = a.Decision.Verdict.String(), a.Decision.Reason.String()
			}
			if row != want {
				t.Errorf("matrix says %+v, Ask says %+v", row, want)
			}
		}
	}
}

func TestMatrixLeavesOut(t *testing.T) {
	m, err := testCluster(t).Matrix("TCP", "80", "shop")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, err := range m.LeftOut() {
		got = append(got, strings.Fields(err.Error())[1])
	}
	if strings.Join(got, " ") != "shop/job shop/new shop/old" {
		t.Errorf("left out: %v", m.LeftOut())
	}
}

func TestMatrixErrors(t *testing.T) {
	c := testCluster(t)
	for _, tt := range []struct{ protocol, port, namespace, want string }{
		{"TCP", "", "", "TCP needs a port"},
		{"TCP", "99999", "", "bad port"},
		{"GRE", "1", "", "unknown protocol"},
		{"TCP", "1", "nowhere", `there is no namespace "nowhere"`},
	} {
		_, err := c.Matrix(tt.protocol, tt.port, tt.namespace)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: error %v", tt, err)
		}
	}
}

func TestMatrixWriteError(t *testing.T) {
	m, err := testCluster(t).Matrix("TCP", "80", "")
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	r.Close()
	if m.WriteText(w) == nil || m.WriteJSON(w) == nil {
		t.Error("writing to a closed pipe is no error")
	}
}

// Cells are many: none of them may cost memory.
func TestMatrixCellAllocations(t *testing.T) {
	m, err := testCluster(t).Matrix("TCP", "5432", "")
	if err != nil {
		t.Fatal(err)
	}
	marks := ""
	allocs := testing.AllocsPerRun(100, func() { marks = m.mark(&m.pods[0], &m.pods[1]) })
	if allocs != 0 || marks == "" {
		t.Errorf("%v allocations for a cell %q", allocs, marks)
	}
}

// TestMatrixAuditOnly has a mark of its own for what passes in audit-only mode.
func TestMatrixAuditOnly(t *testing.T) {
	o := policycache.NewObjects()
	addPod(o, "shop/db", "10.0.0.2")
	addPod(o, "shop/api", "10.0.0.3")
	o.Namespaces["shop"] = &policycache.Namespace{Name: "shop", Mode: "audit-only"}
	o.Policies["shop/closed"] = &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "closed"},
		Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}}}
	c := New(o, policycache.NewCompiler("", slog.New(slog.DiscardHandler)).Compile(o), "")
	m, err := c.Matrix("TCP", "80", "")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	if text := b.String(); !strings.Contains(text, "~  would be denied") || !strings.Contains(text, "1  shop/api  - ~\n2  shop/db   ~ -\n") {
		t.Errorf("got\n%s", text)
	}
}
