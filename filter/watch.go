package filter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Between somebody's `iptables -F` and the next Repair isolated pods stand open. So the
// kernel is asked to tell of changes where it can, and else is asked often for the
// little that tells whether there were any: it costs some netlink exchanges, and no
// iptables command. What gets past this, such as a member of a set exchanged for
// another, is found when everything is compared.

// watchEvery is how often sets, and legacy tables, are looked at.
const watchEvery = 100 * time.Millisecond

// watchBuffer holds the events of a large transaction of others.
const watchBuffer = 4 << 20

// nftMessages is the group of nf_tables' events (NFNLGRP_NFTABLES).
const nftMessages = 7

// Watch tells, until ctx ends, when rules or sets may have been altered, by others or by
// this Kernel: Repair finds out. It watches the network namespace of the calling thread,
// and nobody need take what it tells. An error says which of rules and sets can't be
// watched; the others are.
func (k *Kernel) Watch(ctx context.Context) (altered <-chan struct{}, err error) {
	told := make(chan struct{}, 1)
	tell := func() {
		select {
		case told <- struct{}{}:
		default: // it has been told already
		}
	}
	var tables *legacyTables
	if k.backend == backendNFT {
		err = watchRuleset(ctx, tell)
	} else {
		tables, err = openLegacyTables()
	}
	counter, openErr := openSetCounter()
	go func() {
		defer counter.close()
		defer tables.close()
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if k.setsDiffer(counter) || tables.changed() {
					tell()
				}
			}
		}
	}()
	return told, errors.Join(err, openErr)
}

// setsDiffer tells whether a set of isolated addresses isn't there, or has another
// number of members than it should. A set that is being changed, or isn't known or is
// known to be wrong, is nothing to tell of.
func (k *Kernel) setsDiffer(counter *setCounter) bool {
	if counter == nil || !k.setLock.TryLock() {
		return false
	}
	defer k.setLock.Unlock()
	if k.isolated == nil || k.setsErr != nil {
		return false
	}
	for _, c := range k.commands {
		set := c.fam.isolated().at(k.gate.slot)
		n, err := counter.size(set)
		if errors.Is(err, unix.ENOENT) || err == nil && n != k.isolatedOf[c.fam] {
			return true
		}
	}
	return false
}

// watchRuleset has nf_tables tell of what concerns the tables that iptables-nft calls
// mangle. The kernel tells of a transaction once it is in force (nf_tables_commit).
func watchRuleset(ctx context.Context, tell func()) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open nf_tables netlink: %w", err)
	}
	// Without a large buffer more events are lost, which is told of as well.
	_ = conn.SetReadBuffer(watchBuffer)
	if err := conn.JoinGroup(nftMessages); err != nil {
		conn.Close()
		return fmt.Errorf("listen to nf_tables' events: %w", err)
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	go func() {
		for ctx.Err() == nil {
			msgs, err := conn.Receive()
			if err != nil { // of which ENOBUFS says that events were lost
				tell()
				select {
				case <-ctx.Done():
				case <-time.After(watchEvery):
				}
				continue
			}
			for _, m := range msgs {
				if concernsMangle(m) {
					tell()
					break
				}
			}
		}
	}()
	return nil
}

// concernsMangle tells whether an event is about an iptables mangle table or what is in
// it: all kinds of message name their table by attribute 1.
func concernsMangle(m netlink.Message) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfGenLen {
		return false
	}
	if fam := m.Data[0]; fam != unix.AF_INET && fam != unix.AF_INET6 {
		return false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[nfGenLen:])
	if err != nil {
		return false
	}
	for ad.Next() {
		if ad.Type() == nftaTable {
			return ad.String() == mangle
		}
	}
	return false
}
