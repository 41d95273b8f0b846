package policycache

import (
	"fmt"
	"hash/maphash"
	"reflect"

	"portcullis/verdict"
)

// ruleLists keeps one copy of the rules that many policies have, as those do
// that are put into every namespace alike.
type ruleLists map[uint64]*ruleList

type ruleList struct {
	rules []verdict.Rule
	users int
}

// share gives a list that is equal to the rules, and the number by which it is
// dropped some time. The list must not be changed.
func (x ruleLists) share(rules []verdict.Rule) ([]verdict.Rule, uint64) {
	if len(rules) == 0 {
		return nil, 0
	}
	var h maphash.Hash
	h.SetSeed(labelSeed)
	fmt.Fprintf(&h, "%v", rules)
	hash := h.Sum64()
	list := x[hash]
	if list == nil {
		list = &ruleList{rules: rules}
		x[hash] = list
	} else if !reflect.DeepEqual(list.rules, rules) {
		return rules, 0 // of one hash by chance
	}
	list.users++
	return list.rules, hash
}

func (x ruleLists) drop(hash uint64) {
	list := x[hash]
	if list == nil {
		return
	}
	if list.users--; list.users == 0 {
		delete(x, hash)
	}
}
