// Package controlplane runs a real etcd and kube-apiserver on loopback, for
// tests of what watches an API server.
package controlplane

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Users that may log in: Admin may do anything, Agent what RBAC gives it, which
// is nothing at first.
const (
	Admin = "admin"
	Agent = "agent"
)

// ready bounds how long a program may take to answer.
const ready = 90 * time.Second

// ControlPlane is an etcd and an API server that may be stopped and started.
// Both end with the process that started them.
type ControlPlane struct {
	bin, dir          string
	etcdPort, apiPort int
	peerPort          int
	etcd, api         *exec.Cmd
}

// Start runs etcd and kube-apiserver, whose binaries are in bin, with their
// state in dir. It returns when the API server is ready.
func Start(bin, dir string) (_ *ControlPlane, err error) {
	c := &ControlPlane{bin: bin, dir: dir}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	for _, port := range []*int{&c.etcdPort, &c.apiPort, &c.peerPort} {
		if *port, err = freePort(); err != nil {
			return nil, err
		}
	}
	if err := c.writeFiles(); err != nil {
		return nil, err
	}
	client, peer := fmt.Sprintf("http://127.0.0.1:%d", c.etcdPort), fmt.Sprintf("http://127.0.0.1:%d", c.peerPort)
	c.etcd, err = c.run("etcd", "--name", "test", "--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
		"--initial-cluster", "test="+peer, "--log-level", "warn")
	if err != nil {
		return nil, err
	}
	if err := c.waitFor(client + "/health"); err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	return c, c.StartAPI()
}

// StartAPI starts the API server, after Start or StopAPI, on the port that it
// always has.
func (c *ControlPlane) StartAPI() (err error) {
	c.api, err = c.run("kube-apiserver",
		"--etcd-servers", fmt.Sprintf("http://127.0.0.1:%d", c.etcdPort),
		// Nothing connects to the advertised address; without one the server looks
		// for a default route, which a test's network namespace doesn't have.
		"--advertise-address", "192.0.2.1",
		"--bind-address", "127.0.0.1", "--secure-port", fmt.Sprint(c.apiPort),
		"--cert-dir", filepath.Join(c.dir, "pki"), "--service-cluster-ip-range", "10.96.0.0/16",
		"--authorization-mode", "RBAC", "--token-auth-file", filepath.Join(c.dir, "tokens.csv"),
		"--disable-admission-plugins", "ServiceAccount",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", filepath.Join(c.dir, "sa.key"),
		"--service-account-signing-key-file", filepath.Join(c.dir, "sa.key"))
	if err != nil {
		return err
	}
	if err := c.waitFor(c.Host() + "/readyz"); err != nil {
		return fmt.Errorf("kube-apiserver: %w", err)
	}
	return nil
}

// StopAPI ends the API server; etcd keeps the state.
func (c *ControlPlane) StopAPI() { c.api = stop(c.api) }

// Close ends both.
func (c *ControlPlane) Close() {
	c.StopAPI()
	c.etcd = stop(c.etcd)
}

// Host is the API server's address.
func (c *ControlPlane) Host() string { return fmt.Sprintf("https://127.0.0.1:%d", c.apiPort) }

// Kubeconfig gives the path of a kubeconfig for a user.
func (c *ControlPlane) Kubeconfig(user string) string {
	return filepath.Join(c.dir, user+".kubeconfig")
}

// EtcdEndpoint is where etcd listens for clients.
func (c *ControlPlane) EtcdEndpoint() string { return fmt.Sprintf("127.0.0.1:%d", c.etcdPort) }

// writeFiles makes the key that signs service accounts' tokens, the users'
// tokens, and their kubeconfigs.
func (c *ControlPlane) writeFiles() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"sa.key": pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}),
	}
	var tokens bytes.Buffer
	for user, group := range map[string]string{Admin: "system:masters", Agent: "agents"} {
		token := rand.Text()
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", token, user, user, group)
		files[user+".kubeconfig"] = fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: %s, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: %s}}]
current-context: test
`, c.Host(), user, token, user)
	}
	files["tokens.csv"] = tokens.Bytes()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(c.dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// run starts a program; what it prints goes to a file beside its state.
func (c *ControlPlane) run(program string, args ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(filepath.Join(c.dir, program+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(c.bin, program), args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: make control-plane builds it", err)
	}
	return cmd, nil
}

// stop ends a program and waits for its end. It gives nil, for the caller's
// variable.
func stop(cmd *exec.Cmd) *exec.Cmd {
	if cmd != nil {
		cmd.Process.Kill()
		cmd.Wait()
	}
	return nil
}

// waitFor asks a URL until it answers 200.
func (c *ControlPlane) waitFor(url string) error {
	ctx, cancel := context.WithTimeout(context.Background(), ready)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	last := errors.New("no answer")
	for ctx.Err() == nil {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(response.Status)
		}
		last = err
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("%s isn't ready after %s: %w; see the logs in %s", url, ready, last, c.dir)
}

// freePort finds a port of loopback that nobody listens on.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
