package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// command runs the command and gives what it printed.
func command(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	if err := run(args, &out); err != nil {
		t.Fatalf("image %s: %v", strings.Join(args, " "), err)
	}
	return out.String()
}

// file writes a file and gives its path.
func file(t *testing.T, p, content string, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
	return p
}

// sample makes a tree to build an image from and gives the arguments.
func sample(t *testing.T, out string) []string {
	t.Helper()
	dir := t.TempDir()
	file(t, dir+"/root/usr/lib/libx.so.1.2", "library", 0o644)
	if err := os.Symlink("libx.so.1.2", dir+"/root/usr/lib/libx.so.1"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"/root/tmp", "/root/private"} {
		if err := os.Mkdir(dir+d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	tool := file(t, dir+"/tool", "program", 0o750)
	return []string{"-o", out, "-ref", "example.org/b:2", "-ref", "a:1", "-arch", "arm64",
		"-entrypoint", "/opt/tool,run", "-cmd", "x,y", "-env", "A=b=c", "-rootfs", dir + "/./root/",
		"-link", "/bin/sh=/opt/tool", "/opt/tool=" + tool}
}

// entries reads the layer of an image of an archive.
func entries(t *testing.T, archive, ref string) map[string]*tar.Header {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(archive, &tag)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := map[string]*tar.Header{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = h
	}
}

func TestSameFilesSameArchive(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "")
	var first []byte
	for range 8 { // the names' order would be random
		out := filepath.Join(t.TempDir(), "new", "out.tar")
		printed := strings.Split(strings.TrimSpace(command(t, sample(t, out)...)), "\n")
		if printed[len(printed)-1] != out {
			t.Errorf("the last line is %q, not the path", printed[len(printed)-1])
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
		}
		if !bytes.Equal(first, b) {
			t.Fatal("the same files make two archives")
		}
	}
}

func TestLayout(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	out := filepath.Join(t.TempDir(), "out.tar")
	command(t, sample(t, out)...)
	got := entries(t, out, "a:1")
	for _, want := range []struct {
		name string
		typ  byte
		mode int64
		link string
	}{
		{"tmp/", tar.TypeDir, 0o1777, ""}, // not as the tree has it
		{"etc/", tar.TypeDir, 0o755, ""},
		{"run/", tar.TypeDir, 0o755, ""},
		{"proc/", tar.TypeDir, 0o755, ""},
		{"sys/", tar.TypeDir, 0o755, ""},
		{"dev/", tar.TypeDir, 0o755, ""},
		{"var/log/", tar.TypeDir, 0o755, ""},
		{"private/", tar.TypeDir, 0o700, ""},
		{"opt/", tar.TypeDir, 0o755, ""},
		{"opt/tool", tar.TypeReg, 0o750, ""},
		{"usr/lib/libx.so.1.2", tar.TypeReg, 0o644, ""},
		{"usr/lib/libx.so.1", tar.TypeSymlink, 0o777, "libx.so.1.2"},
		{"bin/sh", tar.TypeSymlink, 0o777, "/opt/tool"},
	} {
		h := got[want.name]
		if h == nil {
			t.Errorf("%s is missing", want.name)
			continue
		}
		if h.Typeflag != want.typ || h.Mode != want.mode || h.Linkname != want.link {
			t.Errorf("%s: type %c, mode %o, link %q", want.name, h.Typeflag, h.Mode, h.Linkname)
		}
	}
	for n, h := range got {
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || h.ModTime.Unix() != 86400 {
			t.Errorf("%s is of %d(%s):%d(%s), %s", n, h.Uid, h.Uname, h.Gid, h.Gname, h.ModTime)
		}
	}
}

func TestConfig(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out.tar")
	command(t, sample(t, out)...)
	tag, err := name.NewTag("example.org/b:2")
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(out, &tag)
	if err != nil {
		t.Fatal(err)
	}
	f, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if f.OS != "linux" || f.Architecture != "arm64" {
		t.Errorf("the image is for %s/%s", f.OS, f.Architecture)
	}
	for what, lists := range map[string][2][]string{
		"entrypoint":  {f.Config.Entrypoint, {"/opt/tool", "run"}},
		"command":     {f.Config.Cmd, {"x", "y"}},
		"environment": {f.Config.Env, {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "A=b=c"}},
	} {
		if !slices.Equal(lists[0], lists[1]) {
			t.Errorf("%s: %q, want %q", what, lists[0], lists[1])
		}
	}
}

func TestMistakes(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "")
	dir := t.TempDir()
	f := file(t, dir+"/file", strings.Repeat("no ELF", 10), 0o644)
	file(t, dir+"/root/lib/x", "x", 0o644)
	out := dir + "/out.tar"
	ok := []string{"-o", out, "-ref", "a:1"}
	with := func(more ...string) []string { return slices.Concat(ok, more) }
	for _, c := range []struct {
		want string
		args []string
	}{
		{"give -o", nil},
		{"give -o", []string{"-o", out}},
		{"give -o", []string{"-ref", "a:1"}},
		{"not defined", with("-nonsense")},
		{"-ref", []string{"-o", out, "-ref", "A b:1", "/x=" + f}},
		{"DST=SRC", with("/x")},
		{"no such file", with("/x=" + dir + "/missing")},
		{"no regular file", with("/x=" + dir)},
		{"absolute path", with("x=" + f)},
		{"absolute path", with("/../x=" + f)},
		{"absolute path", with("/=" + f)},
		{"twice", with("/x="+f, "/x="+f)},
		{"twice", with("-link", "/x=/y", "/x="+f)},
		{"twice", with("-rootfs", dir+"/root", "/lib/x="+f)},
		{"twice", with("/etc=" + f)},
		{"no directory", with("/x="+f, "/x/y="+f)},
		{"PATH=TARGET", with("-link", "/x")},
		{"K=V", with("-env", "x")},
		{"empty word", with("-cmd", "a,,b")},
		{"no such file", with("-rootfs", dir+"/missing")},
		{"is no directory", with("-rootfs", f)},
		{"no such file", []string{"-closure", dir, "missing"}},
		{"bad magic", []string{"-closure", dir, "file"}},
	} {
		err := run(c.args, io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("image %s: %v, want one line with %q", strings.Join(c.args, " "), err, c.want)
		}
	}
	if left, _ := filepath.Glob(out + "*"); len(left) > 0 {
		t.Errorf("mistakes left %q behind", left)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if err := run(with("/x="+f), io.Discard); err == nil {
		t.Error("SOURCE_DATE_EPOCH=yesterday is taken")
	}
}

// TestClosure copies what ls needs to an empty root and, as root, runs it there:
// the loader itself says whether anything is missing.
func TestClosure(t *testing.T) {
	const ls = "/usr/bin/ls"
	if _, err := os.Stat(ls); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for _, p := range strings.Fields(command(t, "-closure", "/", ls)) {
		if target, err := os.Readlink(p); err == nil {
			if err := errors.Join(os.MkdirAll(root+filepath.Dir(p), 0o755), os.Symlink(target, root+p)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		file(t, root+p, string(b), 0o755)
	}
	for _, pattern := range []string{"/usr/bin/ls", "/usr/lib/*/libc.so.6"} {
		if found, _ := filepath.Glob(root + pattern); len(found) != 1 {
			t.Errorf("%s is missing", pattern)
		}
	}
	if os.Getuid() == 0 {
		cmd := exec.Command(ls, "/")
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "usr") {
			t.Errorf("ls, with what it needs: %v: %s", err, out)
		}
	}
}

func TestClosureMissesLibraries(t *testing.T) {
	b, err := os.ReadFile("/usr/bin/ls")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	file(t, root+"/ls", string(b), 0o755)
	if _, err := closure(root, []string{"/ls"}); err == nil {
		t.Error("libraries that aren't there are not missed")
	}
}

// TestClosureStaysInside follows links as if the root were the machine's.
func TestClosureStaysInside(t *testing.T) {
	root := t.TempDir()
	file(t, root+"/usr/lib/real", "", 0o644)
	for link, target := range map[string]string{
		"/lib": "usr/lib", "/abs": "/lib/real", "/up": "../../../../abs", "/loop": "/loop", "/out": "/etc/passwd",
	} {
		if err := os.Symlink(target, root+link); err != nil {
			t.Fatal(err)
		}
	}
	s := &search{root, map[string]bool{}}
	if got, err := s.resolve("/up"); err != nil || got != "/usr/lib/real" {
		t.Errorf("/up is %q, %v", got, err)
	}
	for _, link := range []string{"/up", "/abs", "/lib"} {
		if !s.found[link] {
			t.Errorf("the link %s is not taken along", link)
		}
	}
	for _, bad := range []string{"/loop", "/out"} {
		if got, err := s.resolve(bad); err == nil {
			t.Errorf("%s is %q", bad, got)
		}
	}
}
