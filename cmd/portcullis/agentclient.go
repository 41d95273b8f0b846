package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"portcullis/policycache/live"
)

// agentTimeout bounds how long an answer may take that isn't a stream.
const agentTimeout = 30 * time.Second

// agentClient asks an agent on its Unix socket.
type agentClient struct {
	path string
	http http.Client
}

func dialAgent(path string) *agentClient {
	return &agentClient{path, http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// ask puts a question, and gives the answer to be read and closed. A status that isn't
// OK is an error with the agent's words.
func (c *agentClient) ask(ctx context.Context, method, page string, query url.Values, body io.Reader) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "agent", Path: page, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, c.explain(err)
	}
	if response.StatusCode == http.StatusOK {
		return response, nil
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
	return nil, errors.New(strings.TrimSpace(string(text)))
}

// explain says what to do about an agent that doesn't answer.
func (c *agentClient) explain(err error) error {
	var plain *url.Error
	if errors.As(err, &plain) {
		err = plain.Err
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no agent's socket at %s: does the agent run on this node, and with this --socket?", c.path)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("the agent's socket %s is for root only: %w", c.path, err)
	}
	return fmt.Errorf("the agent on %s doesn't answer: %w", c.path, err)
}

// page copies an answer that isn't a stream to w, and gives its header.
func (c *agentClient) page(ctx context.Context, method, page string, query url.Values, body io.Reader, w io.Writer) (http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	response, err := c.ask(ctx, method, page, query, body)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	_, err = io.Copy(w, response.Body)
	return response.Header, err
}

// read reads an answer's JSON.
func (c *agentClient) read(ctx context.Context, page string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	response, err := c.ask(ctx, http.MethodGet, page, nil, nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(into); err != nil {
		return fmt.Errorf("the agent's answer can't be read: %w", err)
	}
	return nil
}

// there tells whether there is a socket at all.
func (c *agentClient) there() bool {
	info, err := os.Stat(c.path)
	return err == nil && info.Mode().Type() == os.ModeSocket
}

func (c *agentClient) key() string  { return c.path }
func (c *agentClient) name() string { return c.path }

func (c *agentClient) decisions(ctx context.Context, q decisionQuery, use func([]byte, bool) error, seen func()) error {
	query := url.Values{}
	if q.follow {
		query.Set("follow", "1")
	}
	response, err := c.ask(ctx, http.MethodGet, "/v1/decisions", query, nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	history, err := strconv.Atoi(response.Header.Get(historyHeader))
	if err != nil {
		return fmt.Errorf("the agent on %s speaks otherwise: another version?", c.path)
	}
	in := bufio.NewReaderSize(response.Body, 64<<10)
	for n := 0; ; n++ {
		if n == history {
			seen()
		}
		line, err := in.ReadBytes('\n')
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == io.EOF && n >= history && !q.follow:
			return nil
		case err != nil:
			return errAgentEnded
		}
		if err := use(line[:len(line)-1], n < history); err != nil {
			return err
		}
	}
}

var errAgentEnded = errors.New("the agent has ended")

func (c *agentClient) samples(ctx context.Context, every time.Duration, use func(*live.Sample)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		s := new(live.Sample)
		if err := c.read(ctx, "/v1/stats", s); err != nil {
			return err
		}
		use(s)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
