# Two commands do it all on a fresh Debian 12 machine with Go: `make demo` and `make test`. What is built lands in bin/;
# downloads and what takes long to build are cached outside the checkout, in ${VIRTLET_CACHE:-~/.cache/virtlet}.

PREFIX ?= /usr/local

# The Go that hack/setup.sh fetches where there is none that is new enough comes first.
CACHE = $(or $(VIRTLET_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtlet)
export PATH := $(CACHE)/go/$(shell sed -n 's/^go \([0-9.]*\)$$/\1/p' go.mod)/bin:$(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
# The directory of the test guest; as a shell substitution, for it is known only once the guest is built.
GUEST = $$(go run ./test/guest/build)
# That of the Debian image; nothing where there can be none.
DEBIAN = $$([ "$$(id -u)/$$(uname -m)" != 0/x86_64 ] || hack/debian.sh)
VERSION = $$(git describe --tags --always --dirty 2>/dev/null || echo dev)

.NOTPARALLEL: # the tests want the machine to themselves
.PHONY: help setup build plugins image guest debian demo test test-guest test-containerd lab-table lab-sriov lab-kubernetes lint bench bench-network bench-pods install uninstall clean

help: ## list the targets
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install the Debian packages and the Go that are missing
	@hack/setup.sh

# Static binaries. Go's own stamp (-buildvcs) fails in a checkout that belongs to somebody else, as under sudo.
build: ## build bin/virtlet and bin/containerd-shim-virtlet-v2
	@CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)" -o bin/ ./cmd/...

plugins: ## build the reference CNI plugins, pinned in go.mod: bin/cni
	@hack/plugins.sh

image: build ## make the image of the installer for Kubernetes: bin/virtlet-installer.tar
	@go run ./deploy/image -o bin/virtlet-installer.tar -t virtlet-installer:$(VERSION) bin/virtlet bin/containerd-shim-virtlet-v2
	@echo bin/virtlet-installer.tar

guest: ## make the guest that tests boot, and print its directory
	@echo $(GUEST)

debian: setup ## make a Debian cloud image, and print its directory
	@hack/debian.sh

demo: setup build plugins ## boot a VM on a CNI network and fetch a page from it
	@guest=$(GUEST) && test/demo.sh "$$guest"

test: setup build plugins ## run every check and test
	@guest=$(GUEST) && debian=$(DEBIAN) && cloudinit=$$(hack/cloudinit.sh) && \
		VIRTLET_GUEST="$$guest" VIRTLET_DEBIAN="$$debian" VIRTLET_CLOUDINIT="$$cloudinit" hack/test.sh

test-guest: setup build plugins ## run the tests that boot a whole Debian alone
	@debian=$$(hack/debian.sh) && VIRTLET_DEBIAN="$$debian" hack/test.sh guest

test-containerd: setup build plugins ## run the tests of pods with three containerds, crictl and critest: some minutes
	@guest=$(GUEST) && VIRTLET_GUEST="$$guest" hack/pods.sh

lab-table: setup build plugins ## run all labs of CNI plugins and write their table to docs/networking.md
	@guest=$(GUEST) && VIRTLET_GUEST="$$guest" hack/test.sh lab -update

lab-%: setup build plugins ## run the lab of one CNI plugin: make lab-flannel
	@guest=$(GUEST) && VIRTLET_GUEST="$$guest" hack/test.sh lab -v -run '(?i)^Test$*'

lab-sriov: setup build plugins ## give VFs of an emulated SR-IOV card to guests: 4 GB of memory, some minutes
	@CGO_ENABLED=0 VIRTLET_LAB_SRIOV=1 go test -count=1 -timeout 22m -v ./test/sriov

lab-kubernetes: setup build plugins ## run pods on a whole Kubernetes of one node: 4 GB of memory, some minutes, and its build once
	@guest=$(GUEST) && CGO_ENABLED=0 VIRTLET_LAB_KUBERNETES=1 VIRTLET_GUEST="$$guest" VIRTLET_CNI_BIN=$(CURDIR)/bin/cni \
		go test -count=1 -timeout 90m -v ./test/kubernetes

lint: ## run the checks without the tests
	@hack/lint.sh

bench: setup build plugins ## run the benchmarks
	@guest=$(GUEST) && VIRTLET_GUEST="$$guest" hack/test.sh -run '^$$' -bench . -benchmem

bench-pods: setup build plugins ## compare pods with those of runc
	@guest=$(GUEST) && VIRTLET_GUEST="$$guest" hack/pods.sh bench

bench-network: setup build plugins ## measure the datapaths beside other projects' and write docs/performance.md: 6 minutes, alone on the machine
	@guest=$(GUEST) && CGO_ENABLED=0 go run ./test/bench -docs docs -guest "$$guest" -virtlet bin/virtlet -cni bin/cni

install: ## install virtlet, the shim and the plugins below PREFIX (/usr/local)
	@[ -x bin/virtlet ] && [ -d bin/cni ] || $(MAKE) --no-print-directory build plugins
	install -D -m 0755 -t "$(DESTDIR)$(PREFIX)/bin" bin/virtlet bin/containerd-shim-virtlet-v2
	install -d -m 0755 "$(DESTDIR)$(PREFIX)/libexec/virtlet/cni"
	install -m 0755 bin/cni/* "$(DESTDIR)$(PREFIX)/libexec/virtlet/cni"
	install -d -m 0755 "$(DESTDIR)$(PREFIX)/share/bash-completion/completions"
	bin/virtlet completion bash >"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/virtlet"

uninstall: ## remove what install has installed below PREFIX
	rm -rf "$(DESTDIR)$(PREFIX)/bin/virtlet" "$(DESTDIR)$(PREFIX)/bin/containerd-shim-virtlet-v2" "$(DESTDIR)$(PREFIX)/libexec/virtlet" \
		"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/virtlet"

clean: ## remove bin/; the caches stay
	rm -rf bin
