package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Process is a program that runs in a member's namespace.
type Process struct {
	cmd    *exec.Cmd
	out    output
	exited chan struct{}
	err    error
}

// output collects what a program writes while others read it.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// Run starts a program in a member's namespace and comes back at once. The
// program is killed when ctx ends, when the lab is closed and when the calling
// program dies.
func (l *Lab) Run(ctx context.Context, who string, argv ...string) (*Process, error) {
	m, err := l.member(who)
	if err != nil {
		return nil, err
	}
	p := &Process{cmd: exec.CommandContext(ctx, argv[0], argv[1:]...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	// The kernel sends the death signal when the *thread* that started the
	// program ends, so that thread waits for the program.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		defer close(p.exited)
		err := m.do(func() error {
			if err := p.cmd.Start(); err != nil {
				started <- fmt.Errorf("start %s in %s: %w", argv[0], who, err)
				return nil
			}
			started <- nil
			p.err = p.cmd.Wait()
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.procs = append(l.procs, p)
	closed := l.closed
	l.mu.Unlock()
	if closed {
		return nil, errors.Join(errors.New("the lab is closed"), p.kill())
	}
	return p, nil
}

// Output gives what the program has written so far, both streams together.
func (p *Process) Output() string { return p.out.String() }

// PID gives the program's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Signal sends a signal.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.exited }

// Wait waits for the program's end, for at most the timeout, and gives its
// error as os/exec does.
func (p *Process) Wait(timeout time.Duration) error {
	select {
	case <-p.exited:
		return p.err
	case <-time.After(timeout):
		return fmt.Errorf("%s still runs after %s", p.cmd.Path, timeout)
	}
}

// kill ends the program and waits until it is gone; fine if it already is.
func (p *Process) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.cmd.Path, err)
	}
	<-p.exited
	return nil
}

// Command runs a program in a member's namespace to its end and gives what it
// wrote. An error carries that text too.
func (l *Lab) Command(ctx context.Context, who string, argv ...string) (string, error) {
	var out []byte
	err := l.Do(who, func() (err error) {
		out, err = exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		return string(out), fmt.Errorf("run %v in %s: %w: %s", argv, who, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// HTTPClient gives a client whose connections start in a member's namespace.
// URLs must have literal addresses.
func (l *Lab) HTTPClient(who string) *http.Client {
	return &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(_ context.Context, network, addr string) (c net.Conn, err error) {
				err = l.Do(who, func() (err error) {
					c, err = dial(network, addr, 2*time.Second)
					return err
				})
				return c, err
			},
		},
	}
}

// Pid gives the program's process identifier.
func (p *Process) Pid() int { return p.cmd.Process.Pid }
