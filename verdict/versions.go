package verdict

import "maps"

// recentVersions is how many policies' versions are kept beside the others before
// all are put together: what a change costs then doesn't grow with the number of
// policies, but once in so many changes.
const recentVersions = 256

// versions are the policies' versions by their names. They are immutable; with
// makes others.
type versions struct {
	all    map[string]string // but for
	recent map[string]string // these, which are empty for policies that are gone
}

// of gives the version of a policy, "" if there is none.
func (v *versions) of(policy string) string {
	if version, ok := v.recent[policy]; ok {
		return version
	}
	return v.all[policy]
}

// with gives the versions after some have changed, to "" if they are gone.
func (v *versions) with(changed map[string]string) versions {
	if len(changed) == 0 {
		return *v
	}
	next := versions{v.all, make(map[string]string, len(v.recent)+len(changed))}
	maps.Copy(next.recent, v.recent)
	maps.Copy(next.recent, changed)
	if len(next.recent) > recentVersions {
		next = versions{all: next.together()}
	}
	return next
}

// together gives all versions as one map.
func (v *versions) together() map[string]string {
	all := make(map[string]string, len(v.all)+len(v.recent))
	maps.Copy(all, v.all)
	maps.Copy(all, v.recent)
	maps.DeleteFunc(all, func(_, version string) bool { return version == "" })
	return all
}
