// Command image makes a container image out of files, without a container
// engine: an archive that "ctr images import" and "docker load" take. The same
// files give the same archive, to the byte.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const usage = `usage: image -o OUT.tar -ref NAME:TAG [flags] [DST=SRC]...
       image -closure ROOT FILE...

Each DST=SRC copies the file SRC to the absolute path DST of the image. The
second form prints the FILEs, which are below ROOT, and all below ROOT that the
dynamic loader needs to run them. The flags:
`

// options is what the command line asks for.
type options struct {
	out     string
	refs    []string
	arch    string
	config  config
	layer   tree
	closure string
	files   []string // the arguments of -closure
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "image:", err)
		}
		os.Exit(1)
	}
}

// run does what the command line says. The last line that it prints is the
// path of the archive, so that scripts can tell.
func run(args []string, stdout io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	if o.closure != "" {
		paths, err := closure(o.closure, o.files)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(stdout, strings.Join(paths, "\n"))
		return err
	}
	created, err := sourceDate()
	if err != nil {
		return err
	}
	img, err := build(o.layer, o.config, o.arch, created)
	if err != nil {
		return err
	}
	if err := writeArchive(o.out, img, o.refs); err != nil {
		return err
	}
	return describe(stdout, img, o.out)
}

// parse reads the command line and all that it names, file contents excepted.
func parse(args []string) (*options, error) {
	o := &options{layer: newTree()}
	var links, roots []string
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&o.out, "o", "", "write the archive to `FILE`")
	f.Func("ref", "`NAME:TAG` of the image; may be given several times", appendTo(&o.refs))
	f.StringVar(&o.arch, "arch", "amd64", "the image's `ARCH`itecture, as Go names it")
	f.Func("entrypoint", "the entrypoint's `WORDS`, separated by commas", words(&o.config.entrypoint))
	f.Func("cmd", "the command's `WORDS`, separated by commas", words(&o.config.cmd))
	f.Func("env", "set `K=V` in the environment; may be given several times", appendTo(&o.config.env))
	f.Func("rootfs", "add the whole tree below `DIR`; may be given several times", appendTo(&roots))
	f.Func("link", "make `PATH=TARGET` a symbolic link; may be given several times", appendTo(&links))
	f.StringVar(&o.closure, "closure", "", "the `ROOT` below which to look for what the FILEs need")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(os.Stderr, usage)
			f.SetOutput(os.Stderr)
			f.PrintDefaults()
		}
		return nil, err
	}
	if o.closure != "" {
		o.files = f.Args()
		return o, nil
	}
	if o.out == "" || len(o.refs) == 0 {
		return nil, errors.New("give -o FILE and at least one -ref NAME:TAG (-h shows all flags)")
	}
	return o, o.fill(roots, f.Args(), links)
}

// fill gathers the layer's entries: trees, then single files, then links.
func (o *options) fill(roots, files, links []string) error {
	for _, dir := range roots {
		if err := o.layer.addRoot(dir); err != nil {
			return err
		}
	}
	for _, arg := range files {
		dst, src, ok := strings.Cut(arg, "=")
		if !ok {
			return fmt.Errorf("%q isn't of the form DST=SRC (flags come before it)", arg)
		}
		if err := o.layer.addFile(dst, src); err != nil {
			return err
		}
	}
	for _, arg := range links {
		dst, target, ok := strings.Cut(arg, "=")
		if !ok || target == "" {
			return fmt.Errorf("-link %q isn't of the form PATH=TARGET", arg)
		}
		if err := o.layer.addLink(dst, target); err != nil {
			return err
		}
	}
	for _, kv := range o.config.env {
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" {
			return fmt.Errorf("-env %q isn't of the form K=V", kv)
		}
	}
	return nil
}

// appendTo makes a flag that may be given several times.
func appendTo(list *[]string) func(string) error {
	return func(s string) error {
		*list = append(*list, s)
		return nil
	}
}

// words makes a flag of comma-separated words.
func words(list *[]string) func(string) error {
	return func(s string) error {
		*list = strings.Split(s, ",")
		if slices.Contains(*list, "") {
			return errors.New("an empty word")
		}
		return nil
	}
}

// sourceDate is the time that everything in the image is of: 1970 unless
// SOURCE_DATE_EPOCH names another, since the time of the build would make each
// build another image.
func sourceDate() (time.Time, error) {
	s := os.Getenv("SOURCE_DATE_EPOCH")
	if s == "" {
		return time.Unix(0, 0).UTC(), nil
	}
	sec, err := strconv.ParseInt(s, 10, 64)
	if err != nil || sec < 0 {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is %q, not a number of seconds", s)
	}
	return time.Unix(sec, 0).UTC(), nil
}
