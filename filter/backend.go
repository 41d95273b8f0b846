package filter

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-iptables/iptables"
)

// The names of the two iptables backends, as --iptables-backend takes them.
const (
	backendAuto   = "auto"
	backendNFT    = "nft"
	backendLegacy = "legacy"
)

// lockWait is how many seconds an iptables command waits for the lock that
// iptables commands share, before it gives up.
const lockWait = 10

// family is an IP version: 4 or 6.
type family int

func (f family) String() string { return "IPv" + strconv.Itoa(int(f)) }

// binary gives the name of the family's plain iptables command.
func (f family) binary() string {
	if f == 6 {
		return "ip6tables"
	}
	return "iptables"
}

// command is the iptables command of one family and one backend.
type command struct {
	fam     family
	backend string
	path    string
	ipt     tables
}

// findCommand looks in PATH for the command of a family and a backend: by the
// backend's own name (iptables-nft), or else by the plain name, if that turns
// out to be of this backend. The error is ErrNoIptables if there is none.
func findCommand(fam family, backend string) (*command, error) {
	name := fam.binary() + "-" + backend
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath(fam.binary())
		if err != nil || plainBackend(fam) != backend {
			return nil, fmt.Errorf("%w: no %s in PATH=%s; install the package iptables", ErrNoIptables, name, os.Getenv("PATH"))
		}
	}
	proto := iptables.ProtocolIPv4
	if fam == 6 {
		proto = iptables.ProtocolIPv6
	}
	commandsRun.Add(1) // to ask for its version
	ipt, err := iptables.New(iptables.Path(path), iptables.IPFamily(proto), iptables.Timeout(lockWait))
	if err != nil {
		return nil, fmt.Errorf("%w: %s doesn't run: %s", ErrNoIptables, path, oneLine(err))
	}
	return &command{fam, backend, path, tables{ipt}}, nil
}

// plainBackend tells of which backend the plain iptables command is, or ""
// where there is none. Since 1.8 its version names the backend; older ones
// only know the legacy one.
func plainBackend(fam family) string {
	commandsRun.Add(1)
	out, err := exec.Command(fam.binary(), "--version").Output()
	if err != nil {
		return ""
	}
	if bytes.Contains(out, []byte("nf_tables")) {
		return backendNFT
	}
	return backendLegacy
}

// read lists a whole table with one command, so that what it gives is of one
// moment. (The library lists chain by chain.) It changes nothing: to list a
// legacy table would create it in the kernel, hence the look at the tables
// that exist.
func (c *command) read(table string) (listing, error) {
	if c.backend == backendLegacy && !legacyTableExists(c.fam, table) {
		return listing{}, nil
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(c.path, "-w", strconv.Itoa(lockWait), "-t", table, "-S")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	commandsRun.Add(1)
	if err := cmd.Run(); err != nil {
		return listing{}, fmt.Errorf("list the %s table with %s: %w: %s", table, c.path, err, flat(stderr.String()))
	}
	return parseListing(stdout.String()), nil
}

// legacyTableExists asks the kernel which legacy tables this network namespace
// has. /proc/net would be that of the process's first thread, so thread-self.
func legacyTableExists(fam family, table string) bool {
	name := "ip_tables_names"
	if fam == 6 {
		name = "ip6_tables_names"
	}
	b, err := os.ReadFile("/proc/thread-self/net/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return false // the kernel has no legacy iptables, or hasn't loaded it
	}
	return err != nil || slices.Contains(strings.Fields(string(b)), table)
}

// chooseBackend settles "auto" and gives the reason for its choice. A rule in
// a backend that nothing else on the node uses would still work, but its order
// against the other backend's rules would be hard to foresee, and a look at
// the node's rules would not show it.
func chooseBackend(want string) (backend, why string, err error) {
	switch want {
	case backendNFT, backendLegacy:
		return want, "asked for", nil
	case backendAuto, "":
	default:
		return "", "", fmt.Errorf("iptables backend %q is unknown: give auto, nft or legacy", want)
	}
	nft, legacy := backendUse(backendNFT), backendUse(backendLegacy)
	plain := plainBackend(4)
	switch {
	case nft == useMissing && legacy == useMissing:
		return "", "", fmt.Errorf("%w: neither iptables-nft nor iptables-legacy nor iptables in PATH=%s; install the package iptables", ErrNoIptables, os.Getenv("PATH"))
	case nft > legacy:
		return backendNFT, nft.String(), nil
	case legacy > nft:
		return backendLegacy, legacy.String(), nil
	case plain != "":
		return plain, "what the iptables command is", nil
	}
	return backendNFT, "both are there and neither is in use", nil
}

// use is how surely a backend is the one that the node works with.
type use int

const (
	useMissing use = iota // its command isn't there
	useNone               // no rules
	useRules              // somebody's rules
	useKube               // chains of kubelet or kube-proxy
	useHint               // the chain that kubelet makes to tell which backend it is
)

func (u use) String() string {
	return [...]string{"its command is missing", "its command is there", "it has rules", "it has KUBE chains", "it has kubelet's hint chain"}[u]
}

// backendUse looks for signs of use in both families. Kubelet creates
// KUBE-IPTABLES-HINT in the mangle table of the backend that it works with,
// for just this purpose (KEP-3178); older ones leave KUBE chains there too.
// Portcullis's own rules are no sign.
func backendUse(backend string) use {
	found := useMissing
	for _, fam := range []family{4, 6} {
		c, err := findCommand(fam, backend)
		if err != nil {
			continue
		}
		found = max(found, useNone)
		for _, table := range []string{mangle, "nat", "filter"} {
			l, err := c.read(table)
			if err != nil {
				continue // a table that can't be read is no sign of use
			}
			found = max(found, l.use())
		}
	}
	return found
}

// use tells what one table's listing says about its backend.
func (l listing) use() use {
	found := useNone
	for _, r := range l.rules {
		if !isOurs(r.chain) && !isOurs(r.target()) {
			found = max(found, useRules)
		}
	}
	for _, c := range l.chains {
		switch {
		case c == "KUBE-IPTABLES-HINT":
			return useHint
		case strings.HasPrefix(c, "KUBE-"):
			found = useKube
		}
	}
	return found
}

// oneLine gives an error's text without the line breaks that iptables puts
// into its messages.
func oneLine(err error) string { return flat(err.Error()) }

func flat(s string) string { return strings.Join(strings.Fields(s), " ") }
