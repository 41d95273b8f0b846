package filter

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	ipset "github.com/vishvananda/netlink"
)

// Several agents may run in one network namespace while one hands over to
// another. What they have to know of each other is in the kernel's table of bound
// queues: only who has CAP_NET_ADMIN can bind one, a number is bound once, and it
// is free again however its process ends. No rule leads to these queues.
//
// Each agent binds a queue of its own as a badge. The queue's number says which
// slot the agent has, and so which range of queues and which sets. The queue's
// copy range, which no packet needs, says its rank: 0 until it has put its rules
// in place, then one more than that of any other. The highest rank owns the rules.
// Whoever works on rules binds one more queue meanwhile, as a lock.
const (
	// LastQueue is the last number that packets may be queued to.
	LastQueue = firstBadge - 1

	slots      = 7
	firstBadge = lockQueue - slots
	lockQueue  = 65535
)

// ErrSuperseded says that another agent has taken the rules over.
var ErrSuperseded = errors.New("another agent has taken over")

// lockPatience bounds how long an agent waits while another works on the rules,
// which itself may wait for other programs' iptables commands.
const (
	lockPatience = 30 * time.Second
	lockRetry    = 20 * time.Millisecond
)

// badge is an agent that runs.
type badge struct {
	slot  int
	rank  uint32
	owner uint32 // netlink port
}

// badges lists the agents that run in the calling thread's network namespace.
func badges() (all []badge) {
	for _, r := range boundQueues() {
		if r.queue < firstBadge || r.queue == lockQueue {
			continue
		}
		b := badge{slot: int(r.queue) - firstBadge, owner: r.owner}
		if r.mode == nfqueue.NfQnlCopyPacket {
			b.rank = uint32(r.copyRange)
		}
		all = append(all, b)
	}
	return all
}

// Owned tells whether an agent that runs has put rules in place.
func Owned() bool {
	for _, b := range badges() {
		if b.rank > 0 {
			return true
		}
	}
	return false
}

// bindSign binds a queue that no packets are meant for.
func bindSign(queue uint16) (*netlink.Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	if err := bindEmpty(conn, queue); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func bindEmpty(conn *netlink.Conn, queue uint16) error {
	msg, err := configMessage(queue, netlink.Acknowledge, netlink.Attribute{Type: cfgCmd, Data: []byte{cfgCmdBind, 0, 0, 0}})
	if err == nil {
		_, err = conn.Execute(msg)
	}
	return err
}

// lockAgents keeps other agents from working on rules until unlock is called. The
// lock belongs to the calling thread's network namespace.
//
// It tries again on one socket: to close one of this protocol has the kernel wait
// for the nftables transaction under way, and all transactions for it.
func lockAgents() (unlock func(), err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink: %w", err)
	}
	for end := time.Now().Add(lockPatience); ; time.Sleep(lockRetry) {
		err := bindEmpty(conn, lockQueue)
		if err == nil {
			return func() { conn.Close() }, nil
		}
		taken := errors.Is(err, unix.EPERM) || errors.Is(err, unix.EBUSY)
		if late := time.Now().After(end); !taken || late {
			err = explainBind(lockQueue, err)
			if late {
				err = fmt.Errorf("another agent has worked on the rules for more than %s: %w", lockPatience, err)
			}
			return nil, errors.Join(err, conn.Close())
		}
	}
}

// place is where an agent stands beside others. The zero value is that of nobody,
// who owns nothing and is never superseded.
type place struct {
	sign  *netlink.Conn
	slot  int
	rank  atomic.Uint32
	stale map[int]bool // slots whose sets are to go when their agent has gone
}

// Join finds a place for this agent, beside others if they run, and calls open with
// the number of the first queue that it is to bind: the configured one, or if that
// range is another agent's the first free one after it. It changes nothing that others use. Call it
// before SetIsolated and Install.
func (k *Kernel) Join(open func(base uint16) error) error {
	k.ruleLock.Lock()
	defer k.ruleLock.Unlock()
	unlock, err := lockAgents()
	if err != nil {
		return err
	}
	defer unlock()
	others := badges()
	if len(others) == 0 {
		// Somebody without a badge would not know that he is to give way.
		if err := inPlace().checkUnattended(); err != nil {
			return err
		}
	}
	slot := 0
	for hasSlot(others, slot) {
		slot++
	}
	base := int(k.gate.queueBase)
	for len(others) > 0 && anyBound(base, k.gate.span()) {
		base += k.gate.span()
	}
	if slot == slots || base+k.gate.span()-1 > LastQueue {
		return fmt.Errorf("%d agents run on this node already, and no queues from %d on are free beside theirs: stop one", len(others), k.gate.queueBase)
	}
	sign, err := bindSign(uint16(firstBadge + slot))
	if err != nil {
		return explainBind(uint16(firstBadge+slot), err)
	}
	if err := open(uint16(base)); err != nil {
		return errors.Join(err, sign.Close())
	}
	k.place.sign, k.place.slot = sign, slot
	k.setLock.Lock()
	defer k.setLock.Unlock()
	k.gate.queueBase, k.gate.slot = uint16(base), slot
	return nil
}

func hasSlot(all []badge, slot int) bool {
	for _, b := range all {
		if b.slot == slot {
			return true
		}
	}
	return false
}

func anyBound(base, n int) bool {
	for _, r := range boundQueues() {
		if int(r.queue) >= base && int(r.queue) < base+n {
			return true
		}
	}
	return false
}

// own makes this agent the one that owns the rules. The caller holds the lock and
// has put the rules in place.
func (p *place) own() error {
	if p.sign == nil {
		return nil
	}
	rank, all := uint32(1), badges()
	p.stale = map[int]bool{}
	for slot := range slots {
		p.stale[slot] = slot != p.slot
	}
	for _, b := range all {
		if b.slot != p.slot && b.rank >= rank {
			rank = b.rank + 1
		}
	}
	if err := p.wear(rank); err != nil {
		return fmt.Errorf("say who owns the rules: %w", err)
	}
	p.sweepSets()
	return nil
}

// wear writes the rank onto the badge.
func (p *place) wear(rank uint32) error {
	mode := byte(nfqueue.NfQnlCopyPacket)
	if rank == 0 {
		mode = nfqueue.NfQnlCopyNone
	}
	msg, err := configMessage(uint16(firstBadge+p.slot), netlink.Acknowledge,
		netlink.Attribute{Type: cfgParams, Data: append(bigEndian32(rank), mode)})
	if err == nil {
		_, err = p.sign.Execute(msg)
	}
	if err == nil {
		p.rank.Store(rank)
	}
	return err
}

// superseded tells whether another agent has put its rules in place since this one
// has.
func (p *place) superseded() bool {
	own := p.rank.Load()
	if own == 0 {
		return false
	}
	for _, b := range badges() {
		if b.rank > own {
			return true
		}
	}
	return false
}

// lockOwned is lockAgents for the agent that owns the rules; to another the error
// is ErrSuperseded.
func (p *place) lockOwned() (unlock func(), err error) {
	unlock, err = lockAgents()
	if err == nil && p.superseded() {
		unlock()
		return nil, ErrSuperseded
	}
	return unlock, err
}

// sweepSets removes the sets of agents that have gone. One that a rule still refers
// to, for the kernel lets go of it a little after the rule, is left for the next
// time. The caller holds the lock.
func (p *place) sweepSets() {
	all := badges()
	for slot, stale := range p.stale {
		if !stale || hasSlot(all, slot) {
			continue
		}
		busy := false
		for _, fam := range []family{4, 6} {
			for _, s := range fam.setsAt(slot) {
				busy = busy || errors.Is(ipset.IpsetDestroy(s.name), nl.IPSetError(nl.IPSET_ERR_BUSY))
			}
		}
		p.stale[slot] = busy
	}
}

// Superseded tells whether another agent has taken the rules over since Install. It
// costs one read of the kernel's table.
func (k *Kernel) Superseded() bool { return k.place.superseded() }

// Settled is Superseded once whoever works on the rules now is done.
func (k *Kernel) Settled() (superseded bool, err error) {
	unlock, err := lockAgents()
	if err != nil {
		return k.place.superseded(), err
	}
	defer unlock()
	return k.place.superseded(), nil
}

// Resign makes this agent one that owns nothing but goes on to be counted among
// those that run.
func (k *Kernel) Resign() error {
	if k.place.sign == nil {
		return nil
	}
	return k.place.wear(0)
}

// Leave gives the agent's place up. The rules stay as they are.
func (k *Kernel) Leave() error {
	if k.place.sign == nil {
		return nil
	}
	return k.place.sign.Close()
}
