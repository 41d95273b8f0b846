//go:build proof

package proof

import (
	"os"
	"testing"
)

// TestProof measures, and writes RESULTS.md and the plots to PROOF_OUT, by default
// the directory above. It fails if something couldn't be measured, and not by what
// was found: that is for people to read.
func TestProof(t *testing.T) {
	params, err := ParamsFromEnv()
	if err != nil {
		t.Fatal(err)
	}
	machine := ThisMachine("../..")
	results, err := Run(t.Context(), params, programs(t), say)
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
