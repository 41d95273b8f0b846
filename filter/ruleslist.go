package filter

import (
	"slices"
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
