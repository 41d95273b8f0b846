package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/bench/chaos"
	"portcullis/bench/lab"
)

// TestGuardedBeforeTheAPIKnows: a pod whose status names no address yet is guarded
// from when its CNI plugin's result is there on, and only then, and by that alone.
func TestGuardedBeforeTheAPIKnows(t *testing.T) {
	t.Parallel()
	bothModes(t, "early", func(t *testing.T, name string, mode lab.Mode) {
		w := newWorld(t, name)
		results := t.TempDir()
		w.pod(mode, "default/client", 11, "")
		w.host("newcomer", "10.1.0.99", "fd00:1::99") // on the wire; what follows makes it a pod
		w.apply("newcomer.yaml", "apiVersion: v1\nkind: Pod\n"+
			"metadata: {namespace: default, name: newcomer, uid: u-1, labels: {role: db}}\nspec: {nodeName: "+lab.NodeName+"}\n")
		w.apply("policy.yaml", policy("default/db", "{podSelector: {matchLabels: {role: db}}, policyTypes: [Ingress, Egress]}"))
		w.start("--cni-results", results)
		w.expect("allow tcp default/client newcomer:80\nallow tcp newcomer default/client:80")

		result := `{"kind":"cniCacheV1","ifName":"eth0","cniArgs":[["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME","newcomer"],["K8S_POD_UID","u-1"]],
			"result":{"ips":[{"address":"10.1.0.99/24"},{"address":"fd00:1::99/64"}]}}`
		path := filepath.Join(results, "pc-1-eth0")
		w.must(os.WriteFile(path, []byte(result), 0o600))
		const closed = "deny tcp default/client newcomer:80\ndeny tcp newcomer default/client:80"
		w.settle(closed)
		w.expect(closed)
		denied := w.decisions()
		if last := denied[len(denied)-1]; last.Src.Pod != "newcomer" && last.Dst.Pod != "newcomer" {
			t.Errorf("the decision doesn't name the pod: %+v", last)
		}
		w.must(os.Remove(path))
		w.settle("allow tcp default/client newcomer:80\nallow tcp newcomer default/client:80")
	})
}

// TestPodsStarting: pods come one after the other, and what each does first, before
// anybody knows it, is to connect and to be connected to. What its policy allows stands
// at once when it is known; what it doesn't allow never did, not for a moment.
func TestPodsStarting(t *testing.T) {
	t.Parallel()
	bothModes(t, "starting", func(t *testing.T, name string, mode lab.Mode) {
		w := holdWorld(t, name, mode)
		tried, wrong := 0, 0
		for round := range 3 {
			var tries []*attempt
			for i := range 3 {
				// Of each three one is isolated, one is its client, and one is neither.
				pod := fmt.Sprintf("default/p%d-%d", round, i)
				w.newcomer(mode, pod, 30+3*round+i, "role="+[]string{"db", "client", "web"}[i])
			}
			db, client, web := fmt.Sprintf("default/p%d-0", round), fmt.Sprintf("default/p%d-1", round), fmt.Sprintf("default/p%d-2", round)
			tries = w.try(strings.NewReplacer("DB", db, "CLIENT", client, "WEB", web).Replace(`
				allow tcp  CLIENT         DB:80
				allow tcp  DB             CLIENT:80
				allow tcp  DB             default/client:80
				allow tcp  default/client DB:80
				allow tcp  WEB            CLIENT:80
				allow udp  default/web    WEB:80
				deny  tcp  WEB            DB:80
				deny  tcp  DB             default/web:80
				deny  udp  CLIENT         DB:80
				deny  icmp default/web    DB
			`))
			time.Sleep(100 * time.Millisecond)
			w.must(w.lab.Manifests(w.dir))
			wrong += w.await(tries, 100*time.Millisecond)
			tried += len(tries)
		}
		chaos.Report(t, chaos.Row{Fault: fmt.Sprintf("pods that connect before they are known, %s", mode), Load: "nine pods, three at a time", Tried: tried, Wrong: wrong, Lost: w.unaccounted()})
		w.shows("portcullis_held_packets 0")
		w.shows("portcullis_held_packets_refused_total 0")
		w.shows(`portcullis_held_packets_ended_total{end="expired",verdict="deny"} 0`)
	})
}
