// Package demo shows the program at work: a small shop in network namespaces,
// policies that are applied live one after the other, and after each of them
// three witnesses side by side: connections that are really made, what explain
// predicts, and what the agent's decision log tells.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bench/lab"
)

// Options say how the demo is run.
type Options struct {
	// Binary is the program, whose agent is run in the node's namespace.
	Binary string
	// Program is what a user types to run it.
	Program string
	// Mode is how the pods hang on the node.
	Mode lab.Mode
	// Keep is a directory, new or empty, in which the manifests are left; with
	// none, they go with the demo.
	Keep string
	// Verbose shows every decision, and what the agent had to say.
	Verbose bool
	// Color is for terminals.
	Color bool

	story []step
}

// ErrDiffer means that the demo ran to its end and that its witnesses don't
// agree.
var ErrDiffer = errors.New("what really connects, what explain says and what the decision log tells differ, see above")

// Run tells the story to w and takes everything away that it made, also when it
// fails or ctx ends. It needs root and iptables. The error is ErrDiffer if the
// witnesses disagree in some step; any other says what couldn't be done.
func Run(ctx context.Context, w io.Writer, o Options) error {
	if o.story == nil {
		o.story = story
	}
	err := o.run(ctx, &printer{w: w, color: o.Color})
	if ctx.Err() != nil {
		return errors.Join(errors.New("interrupted; the namespaces and the agent are gone"), whatStays(err))
	}
	return err
}

// whatStays keeps of the errors of an interrupted demo those about cleaning up;
// that everything else broke off is no news.
func whatStays(err error) error {
	var cleanup *cleanupError
	if errors.As(err, &cleanup) {
		return cleanup
	}
	return nil
}

// cleanupError says that something may be left behind.
type cleanupError struct{ err error }

func (e *cleanupError) Error() string { return "clean up: " + e.err.Error() }
func (e *cleanupError) Unwrap() error { return e.err }

// preflight finds what the demo can't do without. What the kernel lacks, the
// agent finds.
func preflight() error {
	if os.Geteuid() != 0 {
		return errors.New("the demo needs root, since it makes network namespaces: run it with sudo")
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		return errors.New("iptables is missing: run make demo, which installs what Debian lacks, or apt-get install iptables")
	}
	return nil
}

func (o Options) run(ctx context.Context, p *printer) (err error) {
	if err := preflight(); err != nil {
		return err
	}
	dir, forget, err := manifestDir(o.Keep)
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "portcullis-demo-log-")
	if err != nil {
		return errors.Join(fmt.Errorf("make a directory for the decision log: %w", err), forget())
	}
	l, err := lab.New("demo")
	cleanup := func() error {
		var closing error
		if l != nil {
			closing = l.Close()
		}
		return errors.Join(closing, forget(), os.RemoveAll(scratch))
	}
	defer func() {
		if e := cleanup(); e != nil {
			err = errors.Join(err, &cleanupError{e})
		}
	}()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: a container needs the capabilities SYS_ADMIN, NET_ADMIN and NET_RAW", err)
	}
	if err != nil {
		return err
	}
	// What waits for the network or the agent ends with the lab.
	defer context.AfterFunc(ctx, func() { l.Close() })()
	t := &telling{Options: o, out: p, lab: l, dir: dir, seen: history{},
		log: &logReader{path: filepath.Join(scratch, "decisions.log")}}
	return t.tell(ctx)
}

// telling is a demo under way.
type telling struct {
	Options
	out   *printer
	lab   *lab.Lab
	dir   string
	agent *agent
	log   *logReader
	seen  history
	// problems are those of the last step, so that each is shown once.
	problems []string

	connections, differences int
	latencies                []int64
}

func (t *telling) tell(ctx context.Context) error {
	if err := build(t.lab, t.Mode); err != nil {
		return err
	}
	if err := t.lab.Manifests(t.dir); err != nil {
		return err
	}
	t.out.picture(t.Mode)
	var err error
	t.agent, err = startAgent(ctx, t.lab, t.Binary, t.dir, t.log.path)
	if err != nil {
		return err
	}
	for number, s := range t.story {
		if err := t.step(ctx, number, s); err != nil {
			return err
		}
	}
	if err := t.agent.stop(); err != nil {
		return err
	}
	if t.Verbose {
		t.out.printf("What the agent had to say:\n")
		t.out.indented(t.agent.process.Output(), "   ")
		t.out.printf("\n")
	}
	t.summary()
	if t.out.err != nil {
		return fmt.Errorf("write the story: %w", t.out.err)
	}
	if t.differences > 0 {
		return ErrDiffer
	}
	return nil
}

// step makes one change, waits until it is in force and hears the witnesses.
func (t *telling) step(ctx context.Context, number int, s step) error {
	if err := t.out.step(number, s); err != nil {
		return fmt.Errorf("write the story: %w", err)
	}
	if err := s.enact(t.dir); err != nil {
		return err
	}
	all := connections(t.Mode)
	policies, err := predict(t.dir, all)
	if err != nil {
		return err
	}
	if err := t.agent.inForce(ctx, policies); err != nil {
		return err
	}
	if err := try(t.lab, all); err != nil {
		return err
	}
	if err := t.log.collect(ctx, all); err != nil {
		return err
	}
	problems, err := t.agent.problems()
	if err != nil {
		return err
	}
	t.out.tables(all)
	if groups := t.seen.groups(all); len(groups) > 0 || !anyDue(all) {
		t.out.decisions(groups, t.Verbose)
	}
	t.out.problems(slices.DeleteFunc(slices.Clone(problems), func(text string) bool {
		return slices.Contains(t.problems, text)
	}))
	t.problems = problems
	t.count(all)
	return nil
}

func (t *telling) count(all []connection) {
	t.connections += len(all)
	t.differences += len(differences(all))
	for i := range all {
		for _, d := range all[i].logged {
			t.latencies = append(t.latencies, d.LatencyNs)
		}
	}
}

// summary says how it went and what to try next.
func (t *telling) summary() {
	code := green
	if t.differences > 0 {
		code = red
	}
	t.out.printf("%s\n", t.out.paint(code, fmt.Sprintf("%d steps, %d connections, %d differences",
		len(t.story), t.connections, t.differences)))
	if n := len(t.latencies); n > 0 {
		slices.Sort(t.latencies)
		t.out.printf("%d decisions; half of them took at most %s from reading the packet to the verdict\n",
			n, time.Duration(t.latencies[n/2]).Round(time.Microsecond))
	}
	dir := t.Keep
	t.out.printf("\nTry next:\n")
	if dir == "" {
		dir = "shop-manifests"
		t.out.printf("   %s demo --keep %s      leaves the manifests there, for\n", t.Program, dir)
	}
	t.out.printf("   %s explain --manifests %s --from other/stranger --to shop/db --port 5432\n", t.Program, dir)
	t.out.printf("   %s matrix --manifests %s --port 8080\n", t.Program, dir)
}
