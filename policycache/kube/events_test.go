package kube

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"k8s.io/client-go/rest"

	"portcullis/verdict"
)

func TestEventTexts(t *testing.T) {
	web := &verdict.Endpoint{Namespace: "shop", Name: "web", UID: "u1"}
	db := &verdict.Endpoint{Namespace: "shop", Name: "db", UID: "u2"}
	ip := netip.MustParseAddr
	closed := verdict.NewSide(verdict.Deny, []string{"shop/db-allow", "shop/deny"}, verdict.RuleRef{})
	open := verdict.Side{Verdict: verdict.Allow}
	tcp := verdict.Flow{Src: ip("10.0.0.1"), Dst: ip("10.0.0.2"), Proto: verdict.TCP, DstPort: 5432}
	change := func(f verdict.Flow, with func(*verdict.Flow)) verdict.Flow { with(&f); return f }
	for _, c := range []struct {
		flow     verdict.Flow
		decision verdict.Decision
		want     string
	}{
		{tcp, verdict.Decision{Reason: verdict.ReasonNoRule, Src: web, Dst: db, Egress: open, Ingress: closed}, "{shop web u1 to shop/db:5432 denied by shop/db-allow, shop/deny}"},
		{tcp, verdict.Decision{Reason: verdict.ReasonNoRule, Dst: db, Egress: open, Ingress: closed}, "{shop db u2 from 10.0.0.1 to TCP 5432 denied by shop/db-allow, shop/deny}"},
		{change(tcp, func(f *verdict.Flow) { f.Dst, f.Proto = ip("fd00::1"), verdict.UDP }),
			verdict.Decision{Reason: verdict.ReasonNoRule, Src: web, Egress: closed, Ingress: open}, "{shop web u1 to [fd00::1]:5432 (UDP) denied by shop/db-allow, shop/deny}"},
		{change(tcp, func(f *verdict.Flow) { f.Proto = verdict.ICMP }),
			verdict.Decision{Reason: verdict.ReasonNoRule, Src: web, Dst: db, Egress: open, Ingress: closed}, "{shop web u1 to shop/db (ICMP) denied by shop/db-allow, shop/deny}"},
		{change(tcp, func(f *verdict.Flow) { f.Defect = verdict.ReasonFragment }),
			verdict.Decision{Reason: verdict.ReasonFragment, Dst: db, Egress: open, Ingress: closed}, "{shop db u2 from 10.0.0.1 to TCP denied by shop/db-allow, shop/deny (fragment)}"},
		{tcp, verdict.Decision{Reason: verdict.ReasonNotReady}, "{   }"},
	} {
		got, ok := eventOf(&c.flow, &c.decision)
		if text := fmt.Sprint(got); text != c.want || ok != (c.want != "{   }") {
			t.Errorf("%s, want %s", text, c.want)
		}
	}
}

// TestEventsAreBounded has more different denials than are gathered, and more than
// the rate allows.
func TestEventsAreBounded(t *testing.T) {
	client, err := connect(&rest.Config{Host: "https://192.0.2.1"}, "default", "test")
	if err != nil {
		t.Fatal(err)
	}
	e := NewEvents(client, "n1", slog.New(slog.DiscardHandler))
	defer e.broadcaster.Shutdown()
	src := &verdict.Endpoint{Namespace: "a", Name: "web"}
	for i := range maxGathered + 100 {
		f := verdict.Flow{Dst: netip.MustParseAddr("192.0.2.1"), Proto: verdict.TCP, DstPort: uint16(i)}
		for range 2 {
			e.Denied(&f, &verdict.Decision{Src: src})
		}
	}
	if got := e.Stats().Suppressed; len(e.gathered) != maxGathered || got != 200 {
		t.Errorf("%d gathered, %d suppressed", len(e.gathered), got)
	}
	e.write()
	if got := e.Stats().Suppressed; len(e.gathered) != 0 || got < 200+maxGathered-eventsBurst-5 {
		t.Errorf("%d suppressed", got)
	}
}
