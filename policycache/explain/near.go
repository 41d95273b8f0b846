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
	most := min(3, max(1, len(key)/4))
	for k, p := range c.objects.Pods {
		cost := most + 1
		if d := len(k) - len(key); -most <= d && d <= most {
			cost = editDistance(k, key)
		}
		switch {
		case cost <= most:
		case p.Name == name:
			cost = most + 1
		case strings.HasPrefix(k, key+"-"):
			cost = most + 2
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

// editDistance is the least number of bytes to insert, delete or replace that
// makes b of a (Wagner and Fischer's table, one row kept).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
