package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// triplets name the directories in which Debian keeps the libraries of an
// architecture.
var triplets = map[elf.Machine]string{
	elf.EM_X86_64:  "x86_64-linux-gnu",
	elf.EM_AARCH64: "aarch64-linux-gnu",
}

// maxLinks is how many symbolic links a path may lead over, as in the kernel.
const maxLinks = 40

// search collects what some files need of a root filesystem, which is never
// run: it may be that of another architecture.
type search struct {
	root  string
	found map[string]bool // clean absolute paths inside of root; links too
}

// closure gives the files and all that the dynamic loader needs to run them:
// the interpreter, the libraries, those that the libraries need, and the
// symbolic links by which they are found.
func closure(root string, files []string) ([]string, error) {
	s := &search{root, map[string]bool{}}
	for _, f := range files {
		if err := s.need(f); err != nil {
			return nil, fmt.Errorf("what %s needs: %w", f, err)
		}
	}
	paths := make([]string, 0, len(s.found))
	for p := range s.found {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	return paths, nil
}

// need adds a file and what it needs in turn.
func (s *search) need(file string) error {
	real, err := s.resolve(file)
	if err != nil {
		return err
	}
	if s.found[real] {
		return nil
	}
	s.found[real] = true
	f, err := elf.Open(filepath.Join(s.root, real))
	if err != nil {
		return fmt.Errorf("read %s: %w", real, err)
	}
	defer f.Close()
	interp, err := interpreter(f)
	if err != nil {
		return fmt.Errorf("read the interpreter of %s: %w", real, err)
	}
	if interp != "" {
		if err := s.need(interp); err != nil {
			return err
		}
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read the libraries of %s: %w", real, err)
	}
	for _, lib := range libs {
		if err := s.needLibrary(lib, f.Machine); err != nil {
			return fmt.Errorf("%s: %w", real, err)
		}
	}
	return nil
}

// needLibrary looks for a library where the loader does by default.
func (s *search) needLibrary(lib string, machine elf.Machine) error {
	triplet, ok := triplets[machine]
	if !ok {
		return fmt.Errorf("the library directories of %s aren't known", machine)
	}
	for _, dir := range []string{"/lib/" + triplet, "/usr/lib/" + triplet, "/lib", "/usr/lib"} {
		err := s.need(path.Join(dir, lib))
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return fmt.Errorf("library %s isn't below %s", lib, s.root)
}

// interpreter gives the path of the dynamic loader, or "" for a library or a
// static binary.
func interpreter(f *elf.File) (string, error) {
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			return strings.TrimRight(string(b), "\x00"), err
		}
	}
	return "", nil
}

// resolve follows symbolic links, none of which leads out of the root, and adds
// them. It gives the path without links.
func (s *search) resolve(file string) (string, error) {
	done, rest := "/", strings.TrimPrefix(path.Clean("/"+file), "/")
	var links []string
	for rest != "" {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		next := path.Join(done, part)
		info, err := os.Lstat(filepath.Join(s.root, next))
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			done = next
			continue
		}
		if links = append(links, next); len(links) > maxLinks {
			return "", fmt.Errorf("%s leads over too many links", file)
		}
		target, err := os.Readlink(filepath.Join(s.root, next))
		if err != nil {
			return "", err
		}
		if !path.IsAbs(target) {
			target = path.Join(done, target)
		}
		done, rest = "/", strings.TrimPrefix(path.Join(target, rest), "/")
	}
	for _, l := range links {
		s.found[l] = true
	}
	return done, nil
}
