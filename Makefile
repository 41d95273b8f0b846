# Every target installs what a bare Debian lacks (as root). Go must be there.
SHELL := /bin/bash
export CGO_ENABLED ?= 0
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BENCHTIME ?= 0.5s
BENCHCOUNT ?= 6
FUZZTIME ?= 20s
RUNS ?= 1
PACKAGES := iptables iproute2 conntrack ipset kmod nftables procps

.PHONY: build image image-twice test manifests control-plane test-metrics cluster-deps cluster cluster-up cluster-down cluster-test conformance test-api race demo bench bench-tune bench-smoke bench-micro bench-baseline bench-compare bench-allocs chaos soak fuzz fuzz-hour lint fmt deps clean

build: ## the binary, in the working directory
	go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o portcullis ./cmd/portcullis

ARCH ?= $(shell go env GOARCH)
IMAGE := $(shell sed -n 's/^ *image: *//p' deploy/portcullis.yaml | head -1)
image: .bin/rootfs-$(ARCH) ## the image that deploy/portcullis.yaml names, without Docker; prints the archive's path
	GOOS=linux GOARCH=$(ARCH) go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o .bin/portcullis-$(ARCH) ./cmd/portcullis
	@go run -C deploy/image . -o $(CURDIR)/.bin/images/portcullis-$(ARCH).tar -ref $(IMAGE) -arch $(ARCH) -rootfs $(CURDIR)/.bin/rootfs-$(ARCH) \
	  -entrypoint /usr/local/bin/portcullis /usr/local/bin/portcullis=$(CURDIR)/.bin/portcullis-$(ARCH)
image-twice: ## builds it twice, the second time from nothing, and compares
	@first=$$($(MAKE) -s image | tail -3) && rm -rf .bin/rootfs-$(ARCH) .bin/portcullis-$(ARCH) .bin/images/portcullis-$(ARCH).tar && \
	second=$$($(MAKE) -s image | tail -3) && [[ $$first = "$$second" ]] && echo "two builds, one digest" || (echo "two builds differ"; exit 1)
.bin/rootfs-%: deploy/image/rootfs.sh ## iptables and its libraries, as of Debian now; remove it to have them anew
	rm -rf $@ && deploy/image/rootfs.sh $* $@

deps: ## what the real-kernel tests and the demo run
	@missing=(); for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	if (( $${#missing[@]} )); then apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -q --no-install-recommends "$${missing[@]}"; fi

test: deps ## all tests, those on the real kernel included (as root)
	go test -timeout 30m ./...
	go test -C deploy/image ./...

manifests: ## deploy/*.yaml anew from deploy/kustomize
	go test ./deploy -run Fresh -update

K8S := v1.37.2
K8SFLAGS := $(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,-X $(p).gitVersion=$(K8S) -X $(p).gitMajor=1 -X $(p).gitMinor=37)
KUBE := kube-apiserver kube-controller-manager kube-scheduler kubectl kubelet kube-proxy
K8SBUILD = CGO_ENABLED=0 go build -C deploy/cluster -trimpath -o $(CURDIR)/$@
.bin/etcd: deploy/cluster/go.mod
	$(K8SBUILD) -ldflags '-s -w' go.etcd.io/etcd/server/v3
$(KUBE:%=.bin/%): .bin/%: deploy/cluster/go.mod
	$(K8SBUILD) -ldflags '-s -w $(K8SFLAGS)' k8s.io/kubernetes/cmd/$*
.bin/agnhost: deploy/cluster/go.mod
	$(K8SBUILD) -ldflags '-s -w' k8s.io/kubernetes/test/images/agnhost
.bin/ginkgo: deploy/cluster/go.mod
	$(K8SBUILD) -ldflags '-s -w' github.com/onsi/ginkgo/v2/ginkgo
.bin/e2e.test: deploy/cluster/go.mod
	CGO_ENABLED=0 go test -c -C deploy/cluster -trimpath -ldflags '-s -w $(K8SFLAGS)' -o $(CURDIR)/$@ k8s.io/kubernetes/test/e2e
control-plane: .bin/etcd .bin/kube-apiserver ## real ones, built from Go modules (minutes, once)

# Whoever has containerd from elsewhere keeps it, hence PACKAGE=COMMAND.
CLUSTERPACKAGES := containerd=containerd runc=runc containernetworking-plugins=/usr/lib/cni/bridge openssl=openssl
cluster-deps: deps
	@missing=(); for p in $(CLUSTERPACKAGES); do command -v $${p#*=} >/dev/null || missing+=($${p%=*}); done; \
	if (( $${#missing[@]} )); then apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -q --no-install-recommends "$${missing[@]}"; fi

cluster: cluster-deps image .bin/etcd $(KUBE:%=.bin/%) .bin/agnhost ## all that a cluster is made of
	deploy/cluster/images.sh
cluster-up: cluster ## a real Kubernetes in namespaces: NODES=2 CNI=ptp|bridge PROXY=iptables|nftables DUAL=1|0
	deploy/cluster/up.sh
cluster-down: ## ends it
	deploy/cluster/down.sh
cluster-test: cluster ## the DaemonSet's life on two such clusters, one after the other
	go test -tags cluster ./bench/e2e -run '^TestCluster$$' -count 1 -timeout 20m -v

conformance: cluster .bin/e2e.test .bin/ginkgo ## Kubernetes' own tests of NetworkPolicy, RUNS times, into bench/CONFORMANCE.md
	RUNS=$(RUNS) K8S=$(K8S) go test -tags conformance ./bench/e2e -run '^TestConformance$$' -count 1 -timeout 3h -v

test-api: deps control-plane .bin/kubectl ## the watch of the cluster against a real API server on loopback
	go test -tags apiserver ./policycache ./cmd/portcullis ./bench/proof -run APIServer -count 1

# Debian starts what it installs; the tests run Prometheus in namespaces of their own.
test-metrics: deps ## alerts, dashboard and README's table, with a real Prometheus that scrapes a real agent
	@command -v promtool >/dev/null || (apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -q --no-install-recommends prometheus && (systemctl disable --now prometheus prometheus-node-exporter 2>/dev/null || true))
	go test -tags prometheus ./deploy ./bench/e2e -run Prometheus -count 1

race: deps ## the same under the race detector, but for what is about timing
	@command -v gcc >/dev/null || (apt-get update -q && apt-get install -y -q --no-install-recommends gcc libc6-dev)
	CGO_ENABLED=1 go test -race $$(go list ./... | grep -v /bench)

demo: deps build ## a small shop behind the gate, in namespaces (as root)
	./portcullis demo

# PROOF_ROUNDS, PROOF_CONNECTS, … (bench/proof/params.go) say how much is measured.
PROOF = go test -tags proof ./bench/proof -run '^TestProof$$' -count 1 -timeout 60m -v
bench: deps control-plane ## Portcullis beside all else, side by side, into bench/RESULTS.md and bench/plots (as root; minutes)
	$(PROOF)
bench-tune: deps ## what was tried on the packet's path, into bench/TUNING.md
	PROOF_VARIANTS=tune $(PROOF)
bench-smoke: deps control-plane ## that the proof runs; its figures say nothing and are thrown away
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && env PROOF_OUT=$$out PROOF_ROUNDS=1 PROOF_CONNECTS=10 PROOF_DATAGRAMS=10 \
	  PROOF_FLOOD=20ms PROOF_STREAM=20ms PROOF_CLIENTS=4 PROOF_PAIRS=4 PROOF_PODS=20 PROOF_POLICIES=10,20 PROOF_ON_POD=10 \
	  PROOF_CHANGES=1 PROOF_REACTIONS=8 PROOF_MICROBENCH=10x $(PROOF)

BENCHMARKS := ./bench ./filter ./filter/audit ./policycache/explain
MICRO = go test $(BENCHMARKS) -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) -count $(BENCHCOUNT)
bench-micro: ## decode, decide and compile, as a table
	$(MICRO) > bench.out || (cat bench.out; exit 1)
	go tool benchstat bench.out
bench-baseline: ## what bench-compare and bench-allocs compare with, recorded anew
	$(MICRO) > bench.out || (cat bench.out; exit 1)
	mv bench.out bench/baseline.txt
	go test $(BENCHMARKS) -run '^$$' -bench . -benchmem -benchtime 10x -count 3 > bench/allocs.txt
bench-compare: ## the same as a table beside bench/baseline.txt
	$(MICRO) > bench.out || (cat bench.out; exit 1)
	go tool benchstat bench/baseline.txt bench.out
bench-allocs: ## fails if a benchmark allocates more than in bench/allocs.txt
	BENCHMARKS='$(BENCHMARKS)' go test -tags allocs ./bench -run '^TestAllocs$$' -count 1 -v

SOAK ?= 30m
soak: deps ## SOAK of connections while everything changes at random, held against a slow judge
	SOAK=$(SOAK) go test -tags soak ./bench/soak -run '^TestSoak$$' -count 1 -timeout 24h -v

chaos: deps ## every fault test, and a table of what each found; the last is a soak of CHAOSSOAK
	@rows=$$(mktemp) && trap 'rm -f "$$rows"' EXIT && export CHAOS_ROWS=$$rows && failed= && \
	go test ./bench/e2e -run '^Test(Fault|Handover$$|KilledUnderLoad|FailOpenUnderLoad|NoConnectionOutlives|PodsStarting|AddressReuse)' -count 1 -timeout 30m || failed=1; \
	$(MAKE) -s soak SOAK=$(CHAOSSOAK) >$$rows.soak || { cat $$rows.soak; failed=1; }; rm -f $$rows.soak; \
	go run ./bench/chaos/table $$rows && test -z "$$failed"
CHAOSSOAK ?= 60s

fuzz-hour: ## an hour over all of them
	$(MAKE) fuzz FUZZTIME=$$((3600 / $$(grep -rhE '^func Fuzz' --include='*_test.go' . | wc -l)))s
# Go's fuzzer now and then takes its own deadline for a failure (go.dev/issue/75804, mended in Go 1.27):
# without an input that fails, that is tried again, twice at most.
fuzz: ## each fuzz target for FUZZTIME
	@log=$$(mktemp) && trap 'rm -f "$$log"' EXIT && set -o pipefail && \
	for p in $$(go list ./...); do for f in $$(go test $$p -list '^Fuzz' | grep ^Fuzz); do for try in 1 2 3; do \
	  echo "== $$p $$f"; go test $$p -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) 2>&1 | tee "$$log" && continue 2; \
	  grep -q '^ *context deadline exceeded$$' "$$log" && ! grep -q 'Failing input' "$$log" && (( try < 3 )) || exit 1; done; done; done

lint:
	go vet ./... && go vet -tags apiserver,prometheus,cluster,conformance,proof,allocs,soak ./... && go vet -C deploy/image ./... && go vet -C deploy/cluster ./pause
	go tool staticcheck -tags apiserver,prometheus,cluster,conformance,proof,allocs,soak ./...
	@test -z "$$(gofmt -l .)" || (echo "not gofmt'ed:"; gofmt -l .; exit 1)

fmt:
	gofmt -w .

clean:
	rm -f portcullis bench.out
