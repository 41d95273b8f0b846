package policycache

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
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
		for _, t := range [2]string{k, set[k]} {
			b.WriteString(strconv.Itoa(len(t)))
			b.WriteByte(':')
			b.WriteString(t)
		}
	}
	return b.String()
}
