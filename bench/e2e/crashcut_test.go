package e2e

import (
	"syscall"
	"testing"
	"time"

	"portcullis/bench/lab"
)

// TestOpenedWhileAwayIsCut: what policy denies and was opened while a fail-open agent
// was away carries nothing any more a second after the next agent enforces. What policy
// allows goes on, whoever was there when it was opened.
func TestOpenedWhileAwayIsCut(t *testing.T) {
	t.Parallel()
	bothModes(t, "cut", func(t *testing.T, name string, mode lab.Mode) {
		w := gateWorld(t, name, mode)
		w.start("--fail-open")
		before := w.hold("a/web", "a/db", 80)
		_ = w.stop(syscall.SIGKILL)
		denied, allowed := w.hold("b/free", "a/db", 80), w.hold("a/web", "a/db", 80)
		egress := w.hold("a/db", "b/free", 80)
		w.lives(denied, "no agent ran")
		w.start("--fail-open")
		stalls.after(time.Now(), time.Second)
		for _, c := range append(denied, egress...) {
			if err := c.Exchange("still open?", lab.Timeout); err == nil {
				t.Errorf("the connection from %s to %s, which policy denies, goes on", c.LocalAddr(), c.RemoteAddr())
			}
		}
		w.lives(append(before, allowed...), "another agent had come")
		w.expect(gateJudged)
	})
}
