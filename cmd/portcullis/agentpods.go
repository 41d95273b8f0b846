package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"portcullis/policycache/kube"
	"portcullis/policycache/live"
)

// agentBinary is where the image has this program.
const agentBinary = "/usr/local/bin/portcullis"

// podSource is an agent in a pod, reached by exec through the API server: its own
// program asks it, on the socket that its manifest mounts.
type podSource struct {
	client *kube.Client
	pod    kube.AgentPod
}

func (p podSource) key() string  { return string(p.pod.UID) }
func (p podSource) name() string { return "node " + p.pod.Node }

// run gives the lines of a command's output until it ends.
func (p podSource) run(ctx context.Context, args []string, use func(line []byte) error) error {
	if !p.pod.Running {
		return fmt.Errorf("its agent, pod %s/%s, doesn't run", p.pod.Namespace, p.pod.Name)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out, in := io.Pipe()
	var said tail
	ended := make(chan error, 1)
	go func() {
		err := p.client.Exec(ctx, p.pod, append([]string{agentBinary}, args...), in, &said)
		in.Close()
		ended <- err
	}()
	lines := bufio.NewReaderSize(out, 64<<10)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			break
		}
		if err := use(line[:len(line)-1]); err != nil {
			out.Close()
			cancel()
			<-ended
			return err
		}
	}
	err := <-ended
	if text := said.text(); err != nil && text != "" && ctx.Err() == nil {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// nowLine is what observe writes with --until-eof when the last decisions have been told.
const nowLine = `{"kind":"now"}`

func (p podSource) decisions(ctx context.Context, q decisionQuery, use func([]byte, bool) error, seen func()) error {
	args := append([]string{"observe", "--socket", defaultSocket, "--until-eof", "-o", "json"}, q.flags...)
	if q.follow {
		args = append(args, "--follow")
	}
	old := true
	return p.run(ctx, args, func(line []byte) error {
		if string(line) == nowLine {
			old = false
			seen()
			return nil
		}
		return use(line, old)
	})
}

func (p podSource) samples(ctx context.Context, every time.Duration, use func(*live.Sample)) error {
	args := []string{"top", "--socket", defaultSocket, "--until-eof", "-o", "json", "--interval", every.String()}
	return p.run(ctx, args, func(line []byte) error {
		s := new(live.Sample)
		if err := json.Unmarshal(line, s); err != nil {
			return fmt.Errorf("its answer can't be read: %w", err)
		}
		use(s)
		return nil
	})
}

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	t.b = t.b[max(0, len(t.b)-1024):]
	return len(b), nil
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return oneLine(errors.New(string(t.b)))
}
