package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// standardDirs are in every image: runtimes mount over some of them, and
// programs take others for granted.
var standardDirs = map[string]fs.FileMode{
	"/dev": 0o755, "/etc": 0o755, "/proc": 0o755, "/run": 0o755, "/sys": 0o755,
	"/tmp": 0o777 | fs.ModeSticky, "/var": 0o755, "/var/log": 0o755,
}

// entry is a directory, a file or a symbolic link of the image.
type entry struct {
	mode   fs.FileMode
	source string // a file's contents are those of this one
	target string // what a link leads to
}

// tree holds the image's entries by their absolute paths. The directories above
// each entry are entries too.
type tree map[string]entry

// newTree gives a tree of the standard directories.
func newTree() tree {
	t := tree{}
	for dir, mode := range standardDirs {
		t[dir] = entry{mode: fs.ModeDir | mode}
	}
	return t
}

// add puts an entry in, and the directories above it. A directory that is there
// already stays as it is; anything else that would be there twice is a mistake.
func (t tree) add(dst string, e entry) error {
	if !path.IsAbs(dst) || path.Clean(dst) != dst || dst == "/" {
		return fmt.Errorf("%q isn't a clean absolute path to put something at", dst)
	}
	if old, taken := t[dst]; taken {
		if old.mode.IsDir() && e.mode.IsDir() {
			return nil
		}
		return fmt.Errorf("%s would be in the image twice", dst)
	}
	if dir := path.Dir(dst); dir != "/" {
		if old, ok := t[dir]; ok && !old.mode.IsDir() {
			return fmt.Errorf("%s can't be put below %s, which is no directory", dst, dir)
		}
		if err := t.add(dir, entry{mode: fs.ModeDir | 0o755}); err != nil {
			return err
		}
	}
	t[dst] = e
	return nil
}

// addFile copies one file, its permission bits included.
func (t tree) addFile(dst, src string) error {
	info, err := os.Stat(src)
	if err != nil {
		return fmt.Errorf("file for %s: %w", dst, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("file for %s: %s is no regular file (for a directory there is -rootfs)", dst, src)
	}
	return t.add(dst, entry{mode: info.Mode().Perm(), source: src})
}

// addLink makes a symbolic link, which may lead nowhere.
func (t tree) addLink(dst, target string) error {
	return t.add(dst, entry{mode: fs.ModeSymlink | 0o777, target: target})
}

// addRoot adds all that is below a directory.
func (t tree) addRoot(root string) error {
	return filepath.WalkDir(root, func(src string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("read the tree %s: %w", root, err)
		}
		rel, err := filepath.Rel(root, src)
		if err != nil {
			return fmt.Errorf("read the tree %s: %w", root, err)
		}
		dst := path.Join("/", filepath.ToSlash(rel))
		switch {
		case dst == "/" && d.IsDir():
			return nil
		case dst == "/":
			return fmt.Errorf("-rootfs: %s is no directory", root)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(src)
			if err != nil {
				return fmt.Errorf("read a link: %w", err)
			}
			return t.addLink(dst, target)
		case d.IsDir():
			info, err := d.Info()
			if err != nil {
				return fmt.Errorf("read a directory's mode: %w", err)
			}
			return t.add(dst, entry{mode: info.Mode() & (fs.ModeDir | fs.ModePerm | fs.ModeSticky)})
		}
		return t.addFile(dst, src)
	})
}

// tar writes the tree as a layer: sorted, everything of the same time and
// owned by root, so that nothing of the machine that built it gets in.
func (t tree) tar(mtime time.Time) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	paths := make([]string, 0, len(t))
	for p := range t {
		paths = append(paths, p)
	}
	slices.Sort(paths) // a directory sorts before what is in it
	for _, p := range paths {
		if err := t[p].tar(w, p, mtime); err != nil {
			return nil, fmt.Errorf("put %s into the layer: %w", p, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("finish the layer: %w", err)
	}
	return buf.Bytes(), nil
}

// tar writes one entry.
func (e entry) tar(w *tar.Writer, p string, mtime time.Time) error {
	h := &tar.Header{Name: strings.TrimPrefix(p, "/"), Mode: int64(e.mode.Perm()), ModTime: mtime}
	if e.mode&fs.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch {
	case e.mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		return w.WriteHeader(h)
	case e.mode&fs.ModeSymlink != 0:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.target
		return w.WriteHeader(h)
	}
	data, err := os.ReadFile(e.source)
	if err != nil {
		return err
	}
	h.Typeflag, h.Size = tar.TypeReg, int64(len(data))
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}
