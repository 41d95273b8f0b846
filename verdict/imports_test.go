package verdict

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// allowedImports are all that verdict may know of: no Kubernetes, no I/O, no
// clock.
var allowedImports = map[string]bool{
	"cmp": true, "encoding/binary": true, "hash/maphash": true, "maps": true, "math": true, "math/bits": true,
	"net/netip": true, "slices": true, "strconv": true, "sync/atomic": true,
	"github.com/gaissmai/bart": true,
}

// importsOf lists what the packages below a directory of the repository
// import, tests aside, as "file: import".
func importsOf(t *testing.T, dir string) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	root := filepath.Join("..", dir)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			found[path] = append(found[path], name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Fatalf("no Go files below %s", root)
	}
	return found
}

func TestVerdictIsPure(t *testing.T) {
	for file, imports := range importsOf(t, "verdict") {
		for _, name := range imports {
			if !allowedImports[name] {
				t.Errorf("%s imports %s: verdict knows no Kubernetes, no I/O and no clock", file, name)
			}
		}
	}
}

// TestWhatIfIsPure: what-if questions are answered from what is handed over.
func TestWhatIfIsPure(t *testing.T) {
	for file, imports := range importsOf(t, "policycache/whatif") {
		for _, name := range imports {
			if name == "net" || within(name, []string{"os", "net/http", "syscall", "k8s.io/client-go", "portcullis/policycache/manifest", "portcullis/policycache/kube"}) {
				t.Errorf("%s imports %s: whatif does no I/O but with readers and writers it is given", file, name)
			}
		}
	}
}

// TestLayers guards the direction of the project's own imports: filter and
// policycache know verdict and never each other, and nobody knows cmd.
func TestLayers(t *testing.T) {
	below := map[string][]string{
		"verdict":     {},
		"filter":      {"portcullis/verdict", "portcullis/filter"},
		"policycache": {"portcullis/verdict", "portcullis/policycache"},
		"bench":       {"portcullis/verdict", "portcullis/filter", "portcullis/policycache", "portcullis/bench"},
	}
	for dir, allowed := range below {
		for file, imports := range importsOf(t, dir) {
			for _, name := range imports {
				if own := strings.HasPrefix(name, "portcullis/"); own && !within(name, allowed) {
					t.Errorf("%s imports %s, which its layer must not know", file, name)
				}
			}
		}
	}
}

func within(name string, allowed []string) bool {
	for _, a := range allowed {
		if name == a || strings.HasPrefix(name, a+"/") {
			return true
		}
	}
	return false
}
