package policycache

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"portcullis/verdict"
)

// parseSelector reads a label selector as the API defines it: every label and
// every expression must match, and the empty selector matches everything. The
// requirements that can't be understood are left out of the selector and named
// in the error: what isn't understood doesn't narrow.
func parseSelector(s *metav1.LabelSelector) (labels.Selector, error) {
	selector := labels.NewSelector()
	var errs []error
	add := func(key string, op selection.Operator, values []string) {
		r, err := labels.NewRequirement(key, op, values)
		if err != nil {
			errs = append(errs, err)
			return
		}
		selector = selector.Add(*r)
	}
	for key, value := range s.MatchLabels {
		add(key, selection.Equals, []string{value})
	}
	for _, e := range s.MatchExpressions {
		op, ok := operators[e.Operator]
		if !ok {
			errs = append(errs, fmt.Errorf("%q is not a valid label selector operator", e.Operator))
			continue
		}
		add(e.Key, op, e.Values)
	}
	// MatchLabels is a map: keep the message the same from time to time.
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return selector, errors.Join(errs...)
}

var operators = map[metav1.LabelSelectorOperator]selection.Operator{
	metav1.LabelSelectorOpIn:           selection.In,
	metav1.LabelSelectorOpNotIn:        selection.NotIn,
	metav1.LabelSelectorOpExists:       selection.Exists,
	metav1.LabelSelectorOpDoesNotExist: selection.DoesNotExist,
}

// selectorIDs numbers distinct selectors for as long as the compiler lives, so
// that tables which name them stay usable from one compile to the next.
type selectorIDs struct {
	ids       map[string]verdict.SelectorID
	selectors []labels.Selector
}

func newSelectorIDs() *selectorIDs {
	return &selectorIDs{ids: map[string]verdict.SelectorID{}}
}

func (s *selectorIDs) id(selector labels.Selector) verdict.SelectorID {
	text := selector.String() // sorted, so equal selectors have equal texts
	id, ok := s.ids[text]
	if !ok {
		id = verdict.SelectorID(len(s.selectors))
		s.ids[text] = id
		s.selectors = append(s.selectors, selector)
	}
	return id
}

// labelPair is a label's key and value.
type labelPair struct{ key, value string }

// labelIndex numbers distinct label sets and finds those that a selector
// matches without asking all of them.
type labelIndex struct {
	ids    map[string]uint32
	sets   []labels.Set
	texts  []string // each set as labelText writes it
	byPair map[labelPair][]uint32
	byKey  map[string][]uint32
}

func newLabelIndex() *labelIndex {
	return &labelIndex{ids: map[string]uint32{}, byPair: map[labelPair][]uint32{}, byKey: map[string][]uint32{}}
}

// id gives the number of a label set, a new one for a set not seen before.
func (x *labelIndex) id(set map[string]string) uint32 {
	text := labelText(set)
	id, ok := x.ids[text]
	if ok {
		return id
	}
	id = uint32(len(x.sets))
	x.ids[text] = id
	x.sets = append(x.sets, set)
	x.texts = append(x.texts, text)
	for k, v := range set {
		x.byKey[k] = append(x.byKey[k], id)
		x.byPair[labelPair{k, v}] = append(x.byPair[labelPair{k, v}], id)
	}
	return id
}

// labelText writes a label set so that equal sets have equal texts and others
// don't, whatever bytes they hold.
func labelText(set map[string]string) string {
	keys := make([]string, 0, len(set))
	for k := range set {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var b strings.Builder
	for _, k := range keys {
		fmt.Fprintf(&b, "%d:%s%d:%s", len(k), k, len(set[k]), set[k])
	}
	return b.String()
}

// match gives the bitmap of the label sets that the selector matches.
func (x *labelIndex) match(selector labels.Selector) verdict.Bits {
	var bits verdict.Bits
	requirements, _ := selector.Requirements()
	candidates, narrowed := x.candidates(requirements)
	if !narrowed {
		for id, set := range x.sets {
			if selector.Matches(set) {
				bits.Set(uint32(id))
			}
		}
		return bits
	}
	for _, id := range candidates {
		if selector.Matches(x.sets[id]) {
			bits.Set(id)
		}
	}
	return bits
}

// candidates gives the sets that the narrowest positive requirement leaves;
// false when there is none, and all sets have to be asked.
func (x *labelIndex) candidates(requirements labels.Requirements) (best []uint32, narrowed bool) {
	for _, r := range requirements {
		var ids []uint32
		switch r.Operator() {
		case selection.Equals, selection.In:
			for v := range r.Values() {
				ids = append(ids, x.byPair[labelPair{r.Key(), v}]...)
			}
		case selection.Exists:
			ids = x.byKey[r.Key()]
		default:
			continue
		}
		if !narrowed || len(ids) < len(best) {
			best, narrowed = ids, true
		}
	}
	return best, narrowed
}
