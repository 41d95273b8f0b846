package manifest

import "time"

// everything, in place of a file's name, stands for the whole directory.
const everything = ""

// agenda says which files to look at next, and when: each has its own time, so that a
// busy one keeps no other waiting.
type agenda struct {
	files map[string]appointment
	// earliest is no later than any appointment; looks come no sooner than notBefore.
	earliest, notBefore time.Time
}

// appointment is when to look at a file; limit, unless zero, is the latest that events
// make of it.
type appointment struct{ at, limit time.Time }

func newAgenda() *agenda { return &agenda{files: map[string]appointment{}} }

// event asks for a look at a file once it has been quiet, or when patience ends.
func (a *agenda) event(name string, now time.Time) {
	p := a.files[name]
	if p.limit.IsZero() {
		p.limit = now.Add(patience)
	}
	p.at = now.Add(quiet)
	if p.at.After(p.limit) {
		p.at = p.limit
	}
	a.set(name, p)
}

// put asks for a look at a file besides what events ask for.
func (a *agenda) put(name string, p appointment) {
	if before, known := a.files[name]; known && before.at.Before(p.at) {
		return
	}
	a.set(name, p)
}

func (a *agenda) set(name string, p appointment) {
	a.files[name] = p
	if a.earliest.IsZero() || p.at.Before(a.earliest) {
		a.earliest = p.at
	}
}

// rest has the next look wait a little.
func (a *agenda) rest(now time.Time) { a.notBefore = now.Add(gather) }

// at gives the time of the next look. Something must be on the agenda.
func (a *agenda) at() time.Time {
	if a.earliest.Before(a.notBefore) {
		return a.notBefore
	}
	return a.earliest
}

// take takes off what is due: some files, or all.
func (a *agenda) take(now time.Time) (names []string, all bool) {
	a.earliest = time.Time{}
	for name, p := range a.files {
		switch {
		case p.at.After(now):
			a.set(name, p)
		case name == everything:
			all = true
			delete(a.files, name)
		default:
			names = append(names, name)
			delete(a.files, name)
		}
	}
	return names, all
}
