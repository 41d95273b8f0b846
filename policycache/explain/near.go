package explain

import (
	"cmp"
	"slices"
	"strings"
)

// Near gives up to three pods that a user may have meant by a key
// ("namespace/name") that no pod has, the likeliest first: a few letters off,
// the same name in another namespace, or the name that a controller has added
// its suffix to. It looks at every pod, so it is for one question, not for each
// line of a batch.
func (c *Cluster) Near(key string) []string {
	type candidate struct {
		key  string
		cost int
	}
	var found []candidate
	_, name, _ := strings.Cut(key, "/")
	most := min(3, max(1, len(name)/3))
	for k, p := range c.objects.Pods {
		cost := most + 1
		if d := len(k) - len(key); -most <= d && d <= most {
			cost = editDistance(k, key)
		}
		switch {
		case p.Name == name:
			cost = min(cost, 1)
		case cost <= most:
		case strings.HasPrefix(k, key+"-"):
			cost = most + 1
		default:
			continue
		}
		found = append(found, candidate{k, cost})
	}
	slices.SortFunc(found, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.cost, b.cost), cmp.Compare(a.key, b.key))
	})
	var keys []string
	for _, f := range found[:min(3, len(found))] {
		keys = append(keys, f.key)
	}
	return keys
}

// editDistance is the least number of bytes to insert, delete or replace, or of
// neighbours to swap, that makes b of a (optimal string alignment: the usual
// table, of which the last three rows are kept).
func editDistance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, last, row = last, row, before
		row[0] = i
		for j := 1; j <= len(b); j++ {
			replace := last[j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			row[j] = min(replace, last[j]+1, row[j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
