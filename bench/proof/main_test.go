//go:build proof || apiserver

package proof

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestMain plays a role if this program has been started again for one.
func TestMain(m *testing.M) {
	asked, err := RunRole(os.Args)
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	case asked:
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// programs builds the agent, and gives it with the others.
func programs(t *testing.T) Programs {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(t.TempDir(), "portcullis")
	build := exec.Command("go", "build", "-trimpath", "-o", agent, "portcullis/cmd/portcullis")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build portcullis: %v\n%s", err, out)
	}
	return Programs{Agent: agent, Self: self, Source: "../..", Plane: "../../.bin"}
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }
