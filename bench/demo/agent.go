package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"portcullis/bench/lab"
)

const (
	// httpAddr is the agent's, on the loopback of the node's own namespace.
	httpAddr = "127.0.0.1:9353"
	// patient ends only what hangs.
	patient = 15 * time.Second
	// pollEvery is how often the agent is asked whether it is as far.
	pollEvery = 10 * time.Millisecond
)

// agent is the program under show, in the node's namespace.
type agent struct {
	process *lab.Process
	client  *http.Client
}

// startAgent runs the agent and waits until it is ready.
func startAgent(ctx context.Context, l *lab.Lab, binary, dir, decisionLog string) (*agent, error) {
	p, err := l.Run(ctx, lab.Node, binary, "agent", "--manifests", dir, "--node", lab.NodeName,
		"--http", httpAddr, "--decision-log", decisionLog, "--decision-log-window", "0", "--socket", "")
	if err != nil {
		return nil, err
	}
	a := &agent{process: p, client: l.HTTPClient(lab.Node)}
	return a, a.until(ctx, "the agent is ready", func() error {
		_, err := a.get("/readyz")
		return err
	})
}

// inForce waits until the agent is ready with a state of so many policies. The
// agent counts a state's policies when it has put them in force, and each step
// of the story changes their number.
func (a *agent) inForce(ctx context.Context, policies int) error {
	what := fmt.Sprintf("%d policies are in force", policies)
	return a.until(ctx, what, func() error {
		text, err := a.get("/metrics")
		if err != nil {
			return err
		}
		have, err := metric(text, "portcullis_policies")
		if err != nil {
			return err
		}
		if have != policies {
			return fmt.Errorf("there are %d", have)
		}
		_, err = a.get("/readyz")
		return err
	})
}

// metric gives the whole number that a metric without labels has.
func metric(text, name string) (int, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				return 0, fmt.Errorf("metric %s: %w", name, err)
			}
			return int(f), nil
		}
	}
	return 0, fmt.Errorf("the agent has no metric %s", name)
}

// problems lists what the agent finds wrong with the policies in force, as its
// /readyz?verbose says it.
func (a *agent) problems() ([]string, error) {
	text, err := a.get("/readyz?verbose")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(text) {
		if problem, ok := strings.CutPrefix(line, "[!] "); ok {
			found = append(found, strings.TrimSpace(problem))
		}
	}
	return found, nil
}

// get asks the agent's HTTP server; any status but 200 is an error.
func (a *agent) get(path string) (string, error) {
	resp, err := a.client.Get("http://" + httpAddr + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", resp.Status, strings.Join(strings.Fields(string(body)), " "))
	}
	return string(body), nil
}

// until polls until done gives no error. It ends early when ctx does, or the
// agent, whose last words are then the error.
func (a *agent) until(ctx context.Context, what string, done func() error) error {
	end := time.Now().Add(patient)
	for {
		err := done()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.process.Done():
			return fmt.Errorf("the agent can't work here: %s", lastWords(a.process.Output()))
		case <-time.After(pollEvery):
		}
		if time.Now().After(end) {
			return fmt.Errorf("waited %s in vain until %s: %w", patient, what, err)
		}
	}
}

// lastWords gives the last line that a program wrote, without its name.
func lastWords(output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return strings.TrimPrefix(last, "portcullis: ")
	}
	return "it ended without a word"
}

// stop ends the agent as a service manager does.
func (a *agent) stop() error {
	if err := a.process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop the agent: %w", err)
	}
	if err := a.process.Wait(patient); err != nil {
		return fmt.Errorf("stop the agent: %w: %s", err, lastWords(a.process.Output()))
	}
	return nil
}
