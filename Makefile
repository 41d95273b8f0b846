# Every target installs what a bare Debian lacks (as root). Go must be there.
SHELL := /bin/bash
export CGO_ENABLED ?= 0
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BENCHTIME ?= 0.5s
BENCHCOUNT ?= 6
FUZZTIME ?= 20s
PACKAGES := iptables iproute2 conntrack ipset kmod procps

.PHONY: build image test control-plane test-api race demo bench fuzz lint fmt deps clean

build: ## the binary, in the working directory
	go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o portcullis ./cmd/portcullis

ARCH ?= $(shell go env GOARCH)
IMAGE := $(shell sed -n 's/^ *image: *//p' deploy/portcullis.yaml | head -1)
image: .bin/rootfs-$(ARCH) ## the image that deploy/portcullis.yaml names, without Docker; prints the archive's path
	GOOS=linux GOARCH=$(ARCH) go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o .bin/portcullis-$(ARCH) ./cmd/portcullis
	@go run -C deploy/image . -o $(CURDIR)/.bin/images/portcullis-$(ARCH).tar -ref $(IMAGE) -arch $(ARCH) -rootfs $(CURDIR)/.bin/rootfs-$(ARCH) \
	  -entrypoint /usr/local/bin/portcullis /usr/local/bin/portcullis=$(CURDIR)/.bin/portcullis-$(ARCH)
.bin/rootfs-%: ## iptables and its libraries, as of Debian now; remove it to have them anew
	deploy/image/rootfs.sh $* $@

deps: ## what the real-kernel tests and the demo run
	@missing=(); for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing+=($$p); done; \
	if (( $${#missing[@]} )); then apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -q --no-install-recommends "$${missing[@]}"; fi

test: deps ## all tests, those on the real kernel included (as root)
	go test ./...

K8S := v1.37.2
K8SFLAGS := $(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,-X $(p).gitVersion=$(K8S) -X $(p).gitMajor=1 -X $(p).gitMinor=37)
control-plane: .bin/etcd .bin/kube-apiserver ## real ones, built from Go modules (minutes, once)
.bin/etcd:
	go build -C deploy/cluster -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ go.etcd.io/etcd/server/v3
.bin/kube-apiserver:
	go build -C deploy/cluster -trimpath -ldflags '-s -w $(K8SFLAGS)' -o $(CURDIR)/$@ k8s.io/kubernetes/cmd/kube-apiserver

test-api: control-plane ## the watch of the cluster against a real API server on loopback
	go test -tags apiserver ./policycache ./cmd/portcullis -run APIServer -count 1

race: deps ## the same under the race detector, but for what is about timing
	@command -v gcc >/dev/null || (apt-get update -q && apt-get install -y -q --no-install-recommends gcc libc6-dev)
	CGO_ENABLED=1 go test -race $$(go list ./... | grep -v /bench)

demo: deps build ## a small shop behind the gate, in namespaces (as root)
	./portcullis demo

bench: ## decode, decide and compile, as a table
	go test ./bench ./filter ./filter/audit -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) -count $(BENCHCOUNT) > bench.out \
	  || (cat bench.out; exit 1)
	go tool benchstat bench.out

fuzz: ## each fuzz target for FUZZTIME
	@for p in $$(go list ./...); do for f in $$(go test $$p -list '^Fuzz' | grep ^Fuzz); do \
	  echo "== $$p $$f"; go test $$p -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) || exit 1; done; done

lint:
	go vet ./... && go vet -tags apiserver ./...
	go tool staticcheck -tags apiserver ./...
	@test -z "$$(gofmt -l .)" || (echo "not gofmt'ed:"; gofmt -l .; exit 1)

fmt:
	gofmt -w .

clean:
	rm -f portcullis bench.out
