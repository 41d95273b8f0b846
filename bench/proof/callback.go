package proof

import (
	"context"
	"fmt"
	"time"

	"github.com/florianl/go-nfqueue/v2"
)

// echoByCallback serves queues as go-nfqueue's documentation has it: a callback
// for each packet, a verdict by SetVerdict, a write time-out of 15 ms. It returns
// at a queue that can't be bound, and else never.
func echoByCallback(cfg echoConfig) error {
	for i := range cfg.count {
		nfq, err := nfqueue.Open(&nfqueue.Config{
			NfQueue:      uint16(cfg.base + i),
			MaxPacketLen: copyRange,
			MaxQueueLen:  queueLen,
			Copymode:     nfqueue.NfQnlCopyPacket,
			Flags:        nfqueue.NfQaCfgFlagGSO,
			WriteTimeout: 15 * time.Millisecond,
		})
		if err != nil {
			return fmt.Errorf("open queue %d: %w", cfg.base+i, err)
		}
		if err := nfq.Con.SetReadBuffer(readBuffer); err != nil {
			return err
		}
		accept := func(a nfqueue.Attribute) int {
			_ = nfq.SetVerdict(*a.PacketID, nfqueue.NfAccept)
			return 0
		}
		if err := nfq.RegisterWithErrorFunc(context.Background(), accept, func(error) int { return 0 }); err != nil {
			return fmt.Errorf("register at queue %d: %w", cfg.base+i, err)
		}
	}
	fmt.Println(serving)
	select {}
}
