package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// searchPath is PATH in each image, as in those of Debian.
const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// config is how a container of the image runs unless told otherwise.
type config struct {
	entrypoint, cmd, env []string
}

// build makes an image of one layer.
func build(t tree, c config, arch string, created time.Time) (v1.Image, error) {
	data, err := t.tar(created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}, tarball.WithCompressedCaching, tarball.WithCompressionLevel(gzip.DefaultCompression))
	if err != nil {
		return nil, fmt.Errorf("compress the layer: %w", err)
	}
	img, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: created}},
	})
	if err != nil {
		return nil, fmt.Errorf("add the layer to the image: %w", err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read the image's config: %w", err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", arch
	file.Created = v1.Time{Time: created}
	file.Config = v1.Config{
		Entrypoint: c.entrypoint,
		Cmd:        c.cmd,
		Env:        append([]string{searchPath}, c.env...),
		WorkingDir: "/",
	}
	img, err = mutate.ConfigFile(img, file)
	if err != nil {
		return nil, fmt.Errorf("set the image's config: %w", err)
	}
	return img, nil
}

// writeArchive writes the image under all its names. The archive is complete
// before it is at its place.
func writeArchive(out string, img v1.Image, refs []string) (err error) {
	file, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("read the image's config: %w", err)
	}
	named := map[name.Tag]v1.Image{}
	for _, ref := range refs {
		tag, err := name.NewTag(ref)
		if err != nil {
			return fmt.Errorf("-ref: %w", err)
		}
		// The writer lists the names of one image in random order, but sorts
		// images by name. So each name gets an image of its own, all alike.
		if named[tag], err = mutate.ConfigFile(img, file); err != nil {
			return fmt.Errorf("name the image %s: %w", ref, err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return fmt.Errorf("make the archive's directory: %w", err)
	}
	tmp := out + ".tmp"
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	if err := tarball.MultiWriteToFile(tmp, named); err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	if err := os.Rename(tmp, out); err != nil {
		return fmt.Errorf("put the archive in its place: %w", err)
	}
	return nil
}

// describe prints what was built.
func describe(w io.Writer, img v1.Image, out string) error {
	config, err := img.ConfigName()
	if err != nil {
		return fmt.Errorf("digest of the config: %w", err)
	}
	manifest, err := img.Digest()
	if err != nil {
		return fmt.Errorf("digest of the manifest: %w", err)
	}
	_, err = fmt.Fprintf(w, "config   %s\nmanifest %s\n%s\n", config, manifest, out)
	return err
}
