package proof

import (
	"fmt"
	"testing"
)

// Two packets' ways on one CPU, the second of which finds the worker awake, and what
// else goes on meanwhile.
const traceText = `# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
       proof.test-900     [001] ..s2.   100.000000: netif_receive_skb: dev=veth1 skbaddr=00000000aa len=40
       proof.test-900     [001] d.s4.   100.000004: sched_waking: comm=portcullis pid=77 prio=120 target_cpu=001
           <idle>-0       [000] d.s4.   100.000005: sched_waking: comm=portcullis pid=78 prio=120 target_cpu=000
       proof.test-900     [001] d..2.   100.000006: sched_switch: prev_comm=proof.test prev_pid=900 prev_prio=120 prev_state=S ==> next_comm=portcullis next_pid=77 next_prio=120
      port-cullis-77      [001] .....   100.000007: sys_recvmmsg -> 0x1
      port-cullis-77      [001] .....   100.000009: sys_write(fd: 9, buf: c000, count: 28)
      port-cullis-77      [001] b.s1.   100.000012: net_dev_queue: dev=veth2 skbaddr=00000000aa len=54
      port-cullis-77      [001] b.s1.   100.000015: net_dev_queue: dev=veth2 skbaddr=00000000ab len=54
      port-cullis-77      [001] .....   100.000020: sys_write -> 0x28
       proof.test-900     [001] ..s2.   100.000030: netif_receive_skb: dev=veth1 skbaddr=00000000ac len=40
      port-cullis-77      [001] .....   100.000031: sys_recvmmsg -> 0x1
      port-cullis-77      [001] .....   100.000032: sys_write(fd: 9, buf: c000, count: 20)
      port-cullis-77      [001] .....   100.000033: sys_write -> 0x20
`

func TestMiddle(t *testing.T) {
	for _, c := range []struct {
		sorted []float64
		want   float64
	}{{[]float64{3}, 3}, {[]float64{1, 2}, 1.5}, {[]float64{0, 1, 2, 1000}, 1.5}, {[]float64{1, 1, 1, 2, 2, 2, 3, 900}, 1.75}} {
		if got := middle(c.sorted); got != c.want {
			t.Errorf("%v: %v, want %v", c.sorted, got, c.want)
		}
	}
}

func TestReadTrace(t *testing.T) {
	if got, want := fmt.Sprint(readTrace(traceText)), "[[4000] [2000] [1000] [2000] [3000] [8000]]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := readTrace("nothing\n"); len(got[0]) != 0 {
		t.Errorf("%v", got)
	}
}
