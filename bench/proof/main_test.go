//go:build proof

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

// TestProof measures, and writes RESULTS.md and the plots to PROOF_OUT, by default
// the directory above. It fails if something couldn't be measured, and not by what
// was found: that is for people to read.
func TestProof(t *testing.T) {
	params, err := ParamsFromEnv()
	if err != nil {
		t.Fatal(err)
	}
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
	machine := ThisMachine("../..")
	say := func(format string, args ...any) { fmt.Printf(format+"\n", args...) }
	results, err := Run(t.Context(), params, Programs{Agent: agent, Self: self, Source: "../..", Plane: "../../.bin"}, say)
	if err != nil {
		t.Fatal(err)
	}
	out := os.Getenv("PROOF_OUT")
	if out == "" {
		out = ".."
	}
	if err := results.Write(out, machine); err != nil {
		t.Fatal(err)
	}
}
