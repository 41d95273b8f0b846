package main

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"portcullis/filter"
)

const (
	// forgetAgain is when what failed is tried again.
	forgetAgain = time.Second
	// forgetLatest is how long connections are judged before they are forgotten.
	forgetLatest = time.Second
)

// vacated are addresses that a pod has left, whose connections the kernel is still to
// forget. It takes its time off the way of policy: a table of many connections is
// long to read.
type vacated struct {
	mu    sync.Mutex
	addrs []netip.Addr
	wake  chan struct{} // holds one
}

func (v *vacated) add(addrs []netip.Addr) {
	if len(addrs) == 0 {
		return
	}
	v.mu.Lock()
	v.addrs = append(v.addrs, addrs...)
	v.mu.Unlock()
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

func (v *vacated) take() []netip.Addr {
	v.mu.Lock()
	defer v.mu.Unlock()
	addrs := v.addrs
	v.addrs = nil
	return addrs
}

// forgetUntil has the kernel forget the connections of pods that have gone, as they
// go, until ctx ends. The policy that is in force then is already that of whoever has
// their addresses now.
func (a *agent) forgetUntil(ctx context.Context) {
	var failed error
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.vacated.wake:
		}
		addrs := a.vacated.take()
		// What policy denies now is revoked first, which the decision log tells of.
		judged, enough := context.WithTimeout(ctx, forgetLatest)
		a.revoker.Await(judged)
		enough()
		n, err := filter.ForgetFlows(addrs)
		a.metrics.forgot.Add(float64(n))
		a.note("connections of pods that have gone can't be forgotten", &failed, err)
		if err != nil {
			time.AfterFunc(forgetAgain, func() { a.vacated.add(addrs) })
		} else if n > 0 {
			a.log.Debug("connections of pods that have gone were forgotten", "addresses", len(addrs), "connections", n)
		}
	}
}
