package proof

import (
	"slices"
	"testing"
	"time"
)

func TestParamsFromEnv(t *testing.T) {
	t.Setenv("PROOF_ROUNDS", "2")
	t.Setenv("PROOF_FLOOD", "50ms")
	t.Setenv("PROOF_POLICIES", "10,20")
	p, err := ParamsFromEnv()
	if err != nil || p.Rounds != 2 || p.Flood != 50*time.Millisecond || !slices.Equal(p.Policies, []int{10, 20}) || p.Clients != 32 {
		t.Errorf("%+v, %v", p, err)
	}
	for name, value := range map[string]string{"PROOF_ROUND": "2", "PROOF_PAIRS": "many", "PROOF_CLIENTS": "0", "PROOF_ON_POD": "10,0"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			if p, err := ParamsFromEnv(); err == nil {
				t.Errorf("%s=%s was taken: %+v", name, value, p)
			}
		})
	}
}

func TestVariantsAreDistinct(t *testing.T) {
	p, err := ParamsFromEnv()
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range []string{"all", "tune", "echo,agent-miss,iptables-100"} {
		p.Variants = set
		variants, err := choose(p)
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		for _, v := range variants {
			if names[v.name] {
				t.Errorf("%s: two are called %s", set, v.name)
			}
			names[v.name] = true
		}
	}
	p.Variants = "echo,nobody"
	if _, err := choose(p); err == nil {
		t.Error("a variant that doesn't exist")
	}
}
