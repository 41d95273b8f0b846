package live

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"portcullis/verdict"
)

// Criteria are what a user asks to see. Those that are empty ask for nothing; the
// others must all hold, and of a list one.
type Criteria struct {
	// Namespace and Pod are about either end, From and To about one.
	Namespace, Pod, From, To []string
	Verdict                  []string
	Port                     []string // the destination's
	Policy                   []string // that isolates or admits, in either direction
	// Since is a time in RFC 3339, or how long ago.
	Since string
}

// Filter is criteria, read.
type Filter struct {
	pod, from, to      []endTest
	namespace, verdict []string
	port               []uint16
	policy             []string
	since              time.Time
}

// endTest is a pod's, workload's or node's name, with or without its namespace and
// perhaps with a pattern's signs, or else addresses.
type endTest struct {
	namespace, name string
	addrs           netip.Prefix
}

// verdicts are the words that a record's verdict may be.
var verdicts = []string{verdict.Deny.String(), verdict.Allow.String(), verdict.WouldDeny.String(), "revoked"}

// NewFilter reads criteria. Now is what Since counts from.
func NewFilter(c Criteria, now time.Time) (*Filter, error) {
	f := &Filter{namespace: c.Namespace, policy: c.Policy}
	for _, tests := range []struct {
		flag  string
		texts []string
		into  *[]endTest
	}{{"pod", c.Pod, &f.pod}, {"from", c.From, &f.from}, {"to", c.To, &f.to}} {
		for _, text := range tests.texts {
			t, err := parseEnd(text)
			if err != nil {
				return nil, fmt.Errorf("--%s %q: %w", tests.flag, text, err)
			}
			*tests.into = append(*tests.into, t)
		}
	}
	for _, v := range c.Verdict {
		v = strings.ToLower(v)
		if !slices.Contains(verdicts, v) {
			return nil, fmt.Errorf("--verdict %q: want %s", v, strings.Join(verdicts, ", "))
		}
		f.verdict = append(f.verdict, v)
	}
	for _, text := range c.Port {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("--port %q: want 0 to 65535", text)
		}
		f.port = append(f.port, uint16(n))
	}
	for _, pattern := range slices.Concat(c.Policy, c.Namespace) {
		if _, err := path.Match(pattern, ""); err != nil {
			return nil, fmt.Errorf("%q: %w", pattern, err)
		}
	}
	if c.Since == "" {
		return f, nil
	}
	if ago, err := time.ParseDuration(c.Since); err == nil && ago >= 0 {
		f.since = now.Add(-ago)
		return f, nil
	}
	var err error
	if f.since, err = time.Parse(time.RFC3339Nano, c.Since); err != nil {
		return nil, fmt.Errorf("--since %q: want a duration such as 5m, or a time such as 2026-01-02T15:04:05Z", c.Since)
	}
	return f, nil
}

func parseEnd(text string) (endTest, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		a = a.Unmap().WithZone("")
		return endTest{addrs: netip.PrefixFrom(a, a.BitLen())}, nil
	}
	if p, err := netip.ParsePrefix(text); err == nil {
		return endTest{addrs: p.Masked()}, nil
	}
	namespace, name, whole := strings.Cut(text, "/")
	if !whole {
		namespace, name = "", text
	}
	if name == "" || strings.Contains(name, "/") {
		return endTest{}, fmt.Errorf("want POD, NAMESPACE/POD, an address or a CIDR")
	}
	_, err := path.Match(namespace+"/"+name, "")
	return endTest{namespace: namespace, name: name}, err
}

// matches tells whether an end is meant.
func (t *endTest) matches(e *End) bool {
	if t.addrs.IsValid() {
		a, err := netip.ParseAddr(e.IP)
		return err == nil && t.addrs.Contains(a.Unmap())
	}
	if e.Pod == "" {
		return t.namespace == "" && e.Node != "" && like(t.name, e.Node)
	}
	if t.namespace != "" && !like(t.namespace, e.Namespace) {
		return false
	}
	_, workload, _ := strings.Cut(e.Workload, "/")
	return like(t.name, e.Pod) || workload != "" && like(t.name, workload)
}

// like matches shell patterns, which NewFilter has looked at.
func like(pattern, text string) bool {
	ok, err := path.Match(pattern, text)
	return ok && err == nil
}

func anyEnd(tests []endTest, ends ...*End) bool {
	return len(tests) == 0 || slices.ContainsFunc(tests, func(t endTest) bool {
		return slices.ContainsFunc(ends, t.matches)
	})
}

func anyLike(patterns []string, texts ...string) bool {
	return len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return text != "" && like(p, text) })
	})
}

// Match tells whether a record is to be shown. What is missing always is, from
// Since on: nobody can tell what it was.
func (f *Filter) Match(r *Record) bool {
	if r.Time.Before(f.since) {
		return false
	}
	return r.Missing() || anyLike(f.namespace, r.Src.Namespace, r.Dst.Namespace) &&
		anyEnd(f.pod, &r.Src, &r.Dst) && anyEnd(f.from, &r.Src) && anyEnd(f.to, &r.Dst) &&
		(len(f.verdict) == 0 || slices.Contains(f.verdict, r.Verdict)) &&
		(len(f.port) == 0 || r.Dst.Port != nil && slices.Contains(f.port, *r.Dst.Port)) &&
		anyLike(f.policy, r.policies()...)
}

// policies names those that isolate or admit, as "namespace/name" and as "name".
func (r *Record) policies() (names []string) {
	add := func(p string) {
		_, name, _ := strings.Cut(p, "/")
		names = append(names, p, name)
	}
	for _, s := range [2]*Side{r.Egress, r.Ingress} {
		if s == nil {
			continue
		}
		for _, p := range s.Policies {
			add(p)
		}
		if s.AllowedBy != nil {
			add(s.AllowedBy.Policy)
		}
	}
	return names
}
