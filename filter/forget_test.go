package filter

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// kernelFlows lists the connections of both families as "src dst" of the original
// direction, sorted.
func kernelFlows(t *testing.T) string {
	t.Helper()
	out := kernelRun(t, `(conntrack -L -f ipv4; conntrack -L -f ipv6) 2>/dev/null | sed -n 's/.*\(src=[^ ]*\) \(dst=[^ ]*\) sport.* src=.*/\1 \2/p' | sort -u`)
	return strings.NewReplacer("src=", "", "dst=", "", "\n", ", ").Replace(strings.TrimSpace(out))
}

// TestForgetFlows: connections of an address go, by whichever end and translated or
// not, and those of others stay; by asking for each address, and for all at once.
func TestForgetFlows(t *testing.T) {
	for name, more := range map[string]int{"few": 0, "many": manyAddrs} {
		t.Run(name, func(t *testing.T) {
			kernelNetns(t)
			fill := func() {
				for _, f := range []string{
					"-s 10.0.0.1 -d 10.0.0.2", "-s 10.0.0.2 -d 10.0.0.1", "-s 10.0.0.3 -d 10.0.0.4",
					"-s 10.0.0.3 -d 10.96.0.1 -g 10.0.0.2", // a Service's, behind which 10.0.0.2 is
					"-s 10.0.0.2 -d 192.0.2.1 -n 10.9.9.9", // with its source translated
					"-s fd00::2 -d fd00::1", "-s fd00::3 -d fd00::4",
				} {
					kernelRun(t, "conntrack -I -p tcp --state ESTABLISHED -t 100 --sport 1000 --dport 80 -u ASSURED,SEEN_REPLY "+f+" 2>&1")
				}
			}
			addrs := kernelAddrs("10.0.0.2 fd00::2")
			for i := range more {
				addrs = append(addrs, netip.MustParseAddr(fmt.Sprint("10.7.0.", i+1)))
			}
			fill()
			n, err := ForgetFlows(addrs)
			kernelOK(t, err)
			if got, want := kernelFlows(t), "10.0.0.3 10.0.0.4, fd00::3 fd00::4"; n != 5 || got != want {
				t.Errorf("%d forgotten, left are %q, want 5 and %q", n, got, want)
			}
			if n, err := ForgetFlows(addrs); n != 0 || err != nil {
				t.Errorf("again: %d, %v", n, err)
			}
		})
	}
	if n, err := ForgetFlows(nil); n != 0 || err != nil {
		t.Errorf("nobody's: %d, %v", n, err)
	}
}
