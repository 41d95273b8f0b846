package filter

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"
)

// kernelJoin has a Kernel join, with a process on its queues, and gives its first
// queue.
func kernelJoin(t *testing.T, k *Kernel) (base int) {
	t.Helper()
	kernelOK(t, k.Join(func(first uint16) error {
		base = int(first)
		for i := range k.gate.queues {
			conn, err := bindSign(first + uint16(i))
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
		}
		return nil
	}))
	t.Cleanup(func() { _ = k.Leave() }) // may be the second time
	return base
}

// TestLockExcludes: of many who want it one has the lock at a time.
func TestLockExcludes(t *testing.T) {
	kernelThrowaway(t, func() {
		unlock, err := lockAgents()
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := bindSign(lockQueue); err == nil {
			t.Error("the lock was had twice")
		}
		unlock()
		unlock, err = lockAgents()
		if err != nil {
			t.Errorf("the lock isn't free again: %v", err)
			return
		}
		defer unlock()
		var elsewhere sync.WaitGroup
		elsewhere.Go(func() { // on a thread in the machine's own namespace
			if _, bound := queueOwner(lockQueue); bound {
				t.Error("the lock of a namespace shows in another")
			}
		})
		elsewhere.Wait()
	})
}

// TestJoin: agents get ranges and sets of their own, and those that have left are
// followed by the next.
func TestJoin(t *testing.T) {
	kernelNetns(t)
	first, second, third := kernelNew(t, backendNFT), kernelNew(t, backendNFT), kernelNew(t, backendNFT, func(c *KernelConfig) { c.Queues = 1 })
	if got := []int{kernelJoin(t, first), kernelJoin(t, second), kernelJoin(t, third)}; got[0] != 100 || got[1] != 104 || got[2] != 108 {
		t.Errorf("the first queues are %v, want 100, 104, 108", got)
	}
	if a, b, c := first.gate.slot, second.gate.slot, third.gate.slot; a != 0 || b != 1 || c != 2 {
		t.Errorf("slots %d, %d, %d", a, b, c)
	}
	for _, k := range []*Kernel{first, second, third} {
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
	}
	want := "portcullis-4 portcullis-4-1 portcullis-4-2 portcullis-6 portcullis-6-1 portcullis-6-2"
	if got := strings.Join(strings.Fields(kernelRun(t, "ipset list -n | sort")), " "); got != want {
		t.Errorf("sets %s, want %s", got, want)
	}
	if err := Cleanup(kernelQuiet(), DefaultMarkBits); err == nil || !strings.Contains(err.Error(), "another agent on this node? stop it first") {
		t.Errorf("cleanup beside agents: %v", err)
	}
	kernelOK(t, second.Leave())
	if fourth := kernelNew(t, backendNFT, func(c *KernelConfig) { c.QueueBase = 500 }); kernelJoin(t, fourth) != 500 || fourth.gate.slot != 1 {
		t.Errorf("slot %d, want the one that is free again", fourth.gate.slot)
	}
}

// TestJoinBesideStrangers: a process on the queues that is no agent, or one that knows
// nothing of handing over, is named.
func TestJoinBesideStrangers(t *testing.T) {
	kernelNetns(t)
	stranger, err := bindSign(101)
	kernelOK(t, err)
	defer stranger.Close()
	k := kernelNew(t, backendNFT)
	open := func(base uint16) error {
		conn, err := bindSign(base + 1)
		if err != nil {
			return explainBind(base+1, err)
		}
		return conn.Close()
	}
	if err := k.Join(open); err == nil || !strings.Contains(err.Error(), "queue 101 is already bound") {
		t.Errorf("beside a process on a queue: %v", err)
	}
	kernelOK(t, k.SetIsolated(nil))
	kernelOK(t, k.Install())
	if err := k.Join(open); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("beside an agent without a badge: %v", err)
	}
	if all := badges(); len(all) != 0 {
		t.Errorf("badges are left: %v", all)
	}
}

// TestNewerOwns: whoever installs last owns the rules. The other touches nothing any
// more, until the newer one is gone: then it finds everything wrong and mends it.
func TestNewerOwns(t *testing.T) {
	kernelEach(t, func(t *testing.T, backend string) {
		older, newer := kernelNew(t, backend), kernelNew(t, backend)
		for _, k := range []*Kernel{older, newer} {
			if Owned() != (k == newer) || k.Superseded() {
				t.Errorf("before: owned %t, superseded %t", Owned(), k.Superseded())
			}
			kernelJoin(t, k)
			kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
			kernelOK(t, k.Install())
		}
		if !older.Superseded() || newer.Superseded() {
			t.Errorf("superseded: the older %t, the newer %t", older.Superseded(), newer.Superseded())
		}
		was := kernelTables(t, backend)
		if !strings.Contains(was, "--queue-balance 104:107") || strings.Contains(was, "100:103") {
			t.Fatalf("the rules lead elsewhere:\n%s", was)
		}
		// Even if the newer one's rules have gone it is not the older's to mend.
		kernelRun(t, "iptables-"+backend+" -t mangle -F FORWARD")
		was = kernelTables(t, backend)
		_, err := older.Repair()
		if removed := older.Remove(); !errors.Is(err, ErrSuperseded) || !errors.Is(removed, ErrSuperseded) || kernelTables(t, backend) != was {
			t.Errorf("the older one's repair: %v, removal: %v, tables\n%s", err, removed, kernelTables(t, backend))
		}
		kernelMendOne(t, newer)
		kernelOK(t, newer.Leave()) // as its end does, however it comes
		if older.Superseded() {
			t.Error("still superseded by one that is gone")
		}
		kernelMendOne(t, older)
		if now := kernelTables(t, backend); !strings.Contains(now, "--queue-balance 100:103") || strings.Contains(now, "104:107") {
			t.Errorf("the older one has mended this:\n%s", now)
		}
	})
}

func kernelMendOne(t *testing.T, k *Kernel) {
	t.Helper()
	if said, err := k.Repair(); err != nil || len(said) == 0 {
		t.Errorf("a repair with something to repair says %q, %v", said, err)
	}
	if said, err := k.Repair(); err != nil || len(said) > 0 {
		t.Errorf("the next repair says %q, %v", said, err)
	}
}

// TestStaleSetsGo: the sets of an agent that has left go with a repair of the one
// that has taken over, and not before: until then it may write to them.
func TestStaleSetsGo(t *testing.T) {
	kernelNetns(t)
	older, newer := kernelNew(t, backendNFT), kernelNew(t, backendNFT)
	for _, k := range []*Kernel{older, newer} {
		kernelJoin(t, k)
		kernelOK(t, k.SetIsolated(kernelAddrs("10.0.0.1 fd00::1")))
		kernelOK(t, k.Install())
	}
	sets := func() string { return strings.Join(strings.Fields(kernelRun(t, "ipset list -n | sort")), " ") }
	_, err := newer.Repair()
	kernelOK(t, err)
	if got := sets(); got != "portcullis-4 portcullis-4-1 portcullis-6 portcullis-6-1" {
		t.Errorf("sets while both run: %s", got)
	}
	kernelOK(t, older.SetIsolated(kernelAddrs("10.0.0.2"))) // a last change, to nobody's harm
	kernelOK(t, older.Leave())
	for end := time.Now().Add(5 * time.Second); sets() != "portcullis-4-1 portcullis-6-1"; time.Sleep(50 * time.Millisecond) {
		if _, err := newer.Repair(); err != nil || time.Now().After(end) {
			t.Fatalf("sets %s, %v", sets(), err)
		}
	}
	if got := strings.TrimSpace(kernelRun(t, "ipset list portcullis-4-1 | tail -n 1")); got != "10.0.0.1" {
		t.Errorf("the newer one's members: %s", got)
	}
}
