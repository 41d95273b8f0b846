package e2e

import (
	"os"
	"path/filepath"
	"testing"

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
