package filter

import (
	"slices"
	"strconv"
	"strings"
)

// listing is a table as `iptables -S` prints it: the kernel's own wording of
// the rules, in which two listings can be compared.
type listing struct {
	chains []string // built-in and others
	rules  []rule   // chain by chain, each in order
}

// rule is one line "-A chain text".
type rule struct{ chain, text string }

// parseListing reads the output of `iptables -S`. Lines that declare neither a
// chain nor a rule, such as warnings, are passed over.
func parseListing(out string) listing {
	var l listing
	for line := range strings.Lines(out) {
		verb, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, text, _ := strings.Cut(rest, " ")
		switch verb {
		case "-P", "-N":
			l.chains = append(l.chains, name)
		case "-A":
			l.rules = append(l.rules, rule{name, text})
		}
	}
	return l
}

// of gives the texts of a chain's rules in order.
func (l listing) of(chain string) []string {
	var texts []string
	for _, r := range l.rules {
		if r.chain == chain {
			texts = append(texts, r.text)
		}
	}
	return texts
}

func (l listing) has(chain string) bool { return slices.Contains(l.chains, chain) }

// queues gives the numbers of the queues that rules in chains of ours lead to.
func (l listing) queues() (numbers []uint16) {
	for _, r := range l.rules {
		words := r.words()
		for i, w := range words[:max(0, len(words)-1)] {
			if !isOurs(r.chain) || w != "--queue-num" && w != "--queue-balance" {
				continue
			}
			from, to, several := strings.Cut(words[i+1], ":")
			if !several {
				to = from
			}
			first, err1 := strconv.ParseUint(from, 10, 16)
			last, err2 := strconv.ParseUint(to, 10, 16)
			for n := first; n <= last && err1 == nil && err2 == nil; n++ {
				numbers = append(numbers, uint16(n))
			}
		}
	}
	slices.Sort(numbers)
	return slices.Compact(numbers)
}

// markBits gives the mark bits that rules in chains of ours look for in
// connections.
func (l listing) markBits() (bits uint32) {
	for _, r := range l.rules {
		words := r.words()
		at := slices.Index(words, "connmark")
		if !isOurs(r.chain) || at < 0 || at+2 >= len(words) || words[at+1] != "--mark" {
			continue
		}
		value, _, _ := strings.Cut(words[at+2], "/")
		if n, err := strconv.ParseUint(value, 0, 32); err == nil {
			bits |= uint32(n)
		}
	}
	return bits
}

// target gives the chain or target that the rule jumps or goes to, or "".
func (r rule) target() string {
	words := r.words()
	for i, w := range words[:max(0, len(words)-1)] {
		if w == "-j" || w == "-g" {
			return words[i+1]
		}
	}
	return ""
}

// words splits a rule's text into arguments, undoing the quoting of
// xtables_save_string: double quotes around, a backslash before quotes and
// backslashes.
func (r rule) words() []string {
	var words []string
	var word strings.Builder
	quoted, escaped, open := false, false, false
	for _, c := range r.text {
		switch {
		case escaped:
			word.WriteRune(c)
			escaped = false
		case c == '\\' && quoted:
			escaped = true
		case c == '"':
			quoted, open = !quoted, true
		case c == ' ' && !quoted:
			if open {
				words = append(words, word.String())
			}
			word.Reset()
			open = false
		default:
			word.WriteRune(c)
			open = true
		}
	}
	if open {
		words = append(words, word.String())
	}
	return words
}
