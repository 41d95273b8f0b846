package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// errSocketTaken says that another agent answers on the socket.
var errSocketTaken = errors.New("another agent answers there")

// defaultSocket is where an agent answers those who are root on its node.
const defaultSocket = "/run/portcullis/agent.sock"

// agentSocket is the agent's Unix socket, which only its owner may use.
type agentSocket struct {
	net.Listener
	path string
	file os.FileInfo
}

// listenSocket makes the socket. It never has another mode than 0600, since it is made
// in a directory that nobody else may enter and then moved to its place; there it
// replaces one that a dead agent left behind, but not one that somebody answers on.
func listenSocket(path string) (*agentSocket, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("%s is there and isn't a socket", path)
	}
	switch conn, err := net.DialTimeout("unix", path, time.Second); {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("%s: %w", path, errSocketTaken)
	case !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
		return nil, err
	}
	private, err := os.MkdirTemp(dir, ".p-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(private)
	made := filepath.Join(private, "s")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false) // by then the name may be another's
	s := &agentSocket{Listener: listener, path: path}
	err = os.Chmod(made, 0o600)
	if err == nil {
		s.file, err = os.Lstat(made)
	}
	if err == nil {
		err = os.Rename(made, path)
	}
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return s, nil
}

// remove takes the socket's name away, unless another agent has put its own there.
func (s *agentSocket) remove() error {
	if now, err := os.Lstat(s.path); err != nil || !os.SameFile(now, s.file) {
		return nil
	}
	return os.Remove(s.path)
}
