package manifest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAgendaEvents(t *testing.T) {
	start := time.Unix(1000, 0)
	for _, c := range []struct{ events, want string }{
		{"0", "20"},
		{"0 10", "30"},
		{"0 5 9", "29"},
		{"0 10 19 28", "30"},
		{"0 29", "30"},
		{"0 10 20 30 40 50", "30"},
	} {
		for _, name := range []string{"a.yaml", everything} {
			a := newAgenda()
			a.put(everything, appointment{at: start.Add(rescan)})
			for _, ms := range strings.Fields(c.events) {
				at, err := time.ParseDuration(ms + "ms")
				if err != nil {
					t.Fatal(err)
				}
				a.event(name, start.Add(at))
			}
			a.take(start) // nothing, but reckons anew
			if got := fmt.Sprint(a.at().Sub(start).Milliseconds()); got != c.want {
				t.Errorf("%q: events at %s ms: looked at %s ms, want %s", name, c.events, got, c.want)
			}
		}
	}
}

// TestAgendaKeepsFilesApart: no file waits for another one's events, and what is due at
// nearly the same time is taken together.
func TestAgendaKeepsFilesApart(t *testing.T) {
	start := time.Unix(1000, 0)
	a := newAgenda()
	a.put(everything, appointment{at: start.Add(rescan)})
	a.event("a", start)
	a.event("b", start.Add(2*time.Millisecond))
	a.event("c", start.Add(15*time.Millisecond))
	if at := a.at().Sub(start); at != quiet {
		t.Errorf("the first look comes after %v, want %v", at, quiet)
	}
	if names, all := a.take(start.Add(quiet)); all || !slices.Equal(names, []string{"a"}) {
		t.Errorf("at first %q, all %t", names, all)
	}
	a.rest(start.Add(quiet))
	if at := a.at().Sub(start); at != quiet+gather {
		t.Errorf("the second look comes after %v, want %v", at, quiet+gather)
	}
	if names, all := a.take(start.Add(quiet + gather)); all || !slices.Equal(names, []string{"b"}) {
		t.Errorf("then %q, all %t", names, all)
	}
	if names, all := a.take(start.Add(rescan)); !all || !slices.Equal(names, []string{"c"}) {
		t.Errorf("at last %q, all %t", names, all)
	}
}

// TestUnfinishedIsNotPutOff: what was found being written is looked at again in time,
// however much else changes.
func TestUnfinishedIsNotPutOff(t *testing.T) {
	now := time.Unix(1000, 0)
	next := newAgenda()
	new(Watcher).plan(next, now, true, true, map[string]time.Time{"a": now.Add(quiet)})
	for i := range 5 {
		next.event("a", now.Add(time.Duration(i)*4*time.Millisecond))
		next.event("b", now.Add(time.Duration(i)*4*time.Millisecond))
	}
	if got := next.at().Sub(now); got != quiet {
		t.Errorf("looks again after %v, want %v", got, quiet)
	}
}

func TestPlan(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		dirError      string
		watching, all bool
		unfinished    map[string]time.Time
		want          time.Duration
	}{
		{"", true, true, nil, rescan},
		{"", true, true, map[string]time.Time{"a": now.Add(quiet)}, quiet},
		{"", true, false, map[string]time.Time{"a": now.Add(time.Millisecond)}, gather},
		{"", false, false, nil, retry},
		{"gone", true, false, nil, retry},
	} {
		w, next := &Watcher{dirError: c.dirError}, newAgenda()
		w.plan(next, now, c.watching, c.all, c.unfinished)
		if got := next.at().Sub(now); got != c.want {
			t.Errorf("%+v: looks again after %v", c, got)
		}
	}
}
