package filter

import (
	"sync/atomic"

	"github.com/coreos/go-iptables/iptables"
)

var commandsRun atomic.Uint64

// CommandsRun tells how many iptables commands this process has run. Each costs the
// node some milliseconds of processor time and waits for those of other programs, so
// none may be run for what happens to pods and policies.
func CommandsRun() uint64 { return commandsRun.Load() }

// tables is go-iptables, with each command that it runs counted.
type tables struct{ run *iptables.IPTables }

func (t tables) Insert(table, chain string, pos int, spec ...string) error {
	commandsRun.Add(1)
	return t.run.Insert(table, chain, pos, spec...)
}

func (t tables) Append(table, chain string, spec ...string) error {
	commandsRun.Add(1)
	return t.run.Append(table, chain, spec...)
}

func (t tables) Delete(table, chain string, spec ...string) error {
	commandsRun.Add(1)
	return t.run.Delete(table, chain, spec...)
}

func (t tables) NewChain(table, chain string) error {
	commandsRun.Add(1)
	return t.run.NewChain(table, chain)
}

// ClearChain empties a chain that exists. The library tries to make it first.
func (t tables) ClearChain(table, chain string) error {
	commandsRun.Add(2)
	return t.run.ClearChain(table, chain)
}

func (t tables) DeleteChain(table, chain string) error {
	commandsRun.Add(1)
	return t.run.DeleteChain(table, chain)
}
