// Package manifest reads the cluster's state from a directory of Kubernetes
// manifests, once (Load) or following its changes (Watcher).
//
// A manifest file is one whose name ends in .yaml, .yml or .json and doesn't
// begin with a dot, in the directory itself and not below it, as in
// "kubectl apply -f DIR"; symbolic links are followed, so that a mounted
// ConfigMap works. Of a cluster's objects Namespaces, Pods, Nodes and
// NetworkPolicies are read and all others passed over.
//
// NetworkPolicies are decoded strictly: an unknown field or a value of the
// wrong type is an error. What a policy means, and whether it makes sense, is
// for the compiler of package policycache.
package manifest

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"portcullis/policycache"
)

// Load reads the state that dir, a directory of manifests or one manifest
// file, describes. Any error in any file is an error; it has a line for each,
// with file, document and object. Remarks go to slog's default logger.
func Load(dir string) (*policycache.Objects, error) {
	parts, errs := readAll(dir)
	return combine(parts, errs)
}

// LoadWith is Load for several directories or files and then the content of one
// more file, which is read already. Of an object that is given twice the later
// one counts.
func LoadWith(dirs []string, name string, data []byte) (*policycache.Objects, error) {
	var parts []part
	var errs []error
	for _, dir := range dirs {
		some, wrong := readAll(dir)
		parts, errs = append(parts, some...), append(errs, wrong...)
	}
	last, wrong := readPart(name, data)
	return combine(append(parts, last), append(errs, wrong...))
}

// readAll reads the files of a directory, or one file.
func readAll(dir string) (parts []part, errs []error) {
	paths, err := list(dir)
	if err != nil {
		return nil, []error{err}
	}
	for _, path := range paths {
		name := filepath.Base(path)
		data, err := os.ReadFile(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, unreadable(err)))
			continue
		}
		p, wrong := readPart(name, data)
		parts, errs = append(parts, p), append(errs, wrong...)
	}
	return parts, errs
}

func readPart(name string, data []byte) (part, []error) {
	objs, errs := decode(name, data, slog.Default())
	for i, err := range errs {
		errs[i] = fmt.Errorf("%s: %w", name, err)
	}
	return part{name, objs}, errs
}

func combine(parts []part, errs []error) (*policycache.Objects, error) {
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	objs, doubled := union(parts)
	for _, d := range doubled {
		slog.Warn(d.String())
	}
	return objs, nil
}

// unreadable words an error of reading a file without its path, which every
// line has in front anyway.
func unreadable(err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		err = pathError.Err
	}
	return fmt.Errorf("can't be read: %w", err)
}

// list gives the paths of dir's manifest files, sorted by name. If dir is a
// file, that is the only one, whatever its name.
func list(dir string) ([]string, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("can't read the manifests: %w", err)
	}
	if !info.IsDir() {
		return []string{dir}, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("can't read the manifests: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if path := filepath.Join(dir, e.Name()); isManifest(path, e) {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// isManifest goes by the name, and leaves out what can't be read like a file:
// directories, and pipes, which would block. A link that leads nowhere stays
// in, so that reading it fails and is reported.
func isManifest(path string, e fs.DirEntry) bool {
	if !isManifestName(e.Name()) {
		return false
	}
	if e.Type()&fs.ModeSymlink == 0 {
		return e.Type().IsRegular()
	}
	info, err := os.Stat(path)
	return err != nil || info.Mode().IsRegular()
}

func isManifestName(name string) bool {
	return !strings.HasPrefix(name, ".") && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}
