# `make` tells what there is. Every target installs what it needs first: on Debian, as root or with sudo.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# rustup puts its programs there, and a shell that was open before does not know yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)

CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
LAZYVM := $(CARGO_TARGET_DIR)/release/lazyvm

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## The program, optimized: target/release/lazyvm
	@.ci/set-up build
	cargo build --release --locked --package lazyvm

.PHONY: demo
demo: build ## A running VM moves from one process to another while you watch; needs /dev/kvm
	@tests/demo.sh $(LAZYVM)

.PHONY: test
test: lint ## All checks and all tests; with CI set, a test that would have to skip fails
	@.ci/set-up build test
	cargo test --release --locked --workspace

.PHONY: lint
lint: ## Formatting, clippy and the documentation's links; a warning is an error
	@.ci/set-up build lint
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

.PHONY: fuzz
fuzz: ## Every fuzz target for a minute (FUZZ_SECONDS=60), two at a time (FUZZ_AT_A_TIME=2)
	@.ci/set-up build fuzz
	.ci/fuzz

.PHONY: bench
bench: build ## The micro-benchmarks, and the runs behind docs/benchmarks.md
	@cargo bench --locked --package lazyvm-benches
	for push in off on; do
		echo "lazyvm bench fault --push $$push"
		$(LAZYVM) bench fault --push $$push --json -
	done
	for content in random zero mixed; do
		echo "lazyvm bench push --content $$content"
		$(LAZYVM) bench push --content $$content --json -
	done

.PHONY: bench-wan
bench-wan: build ## A Linux guest over an emulated long path, beside QEMU's own post-copy; as root
	@.ci/set-up test
	for memory in 512M 2G; do
		echo "lazyvm bench wan --memory $$memory"
		$(LAZYVM) bench wan --guest qemu --compare qemu --memory $$memory --runs 3 \
			--json $(CARGO_TARGET_DIR)/wan-$$memory.json --html $(CARGO_TARGET_DIR)/wan-$$memory.html
	done
