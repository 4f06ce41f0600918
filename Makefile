# How virtio-test is built, checked and tried. `make help` lists what there is.
#
# Every target does its own set-up, inside this folder: the environment .venv follows requirements-dev.txt, the
# compiled core follows the Rust sources, and neither is made again while those are unchanged. The only
# things outside are Debian packages, installed by tools/debian-packages when they are missing, and the user's
# caches: cargo's, pip's and ours, where tests/kernel keeps kernels and QEMU.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Cargo and pytest use every core themselves; two of them at once only mix their output.
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
JOBS ?= $(shell nproc)

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs')

# rustup's own place, for shells that have not read its env file yet.
export PATH := $(PATH):$(HOME)/.cargo/bin
export VIRTUAL_ENV := $(VENV)
# One interpreter for cargo and maturin alike, or each would rebuild what the other has built.
export PYO3_PYTHON := $(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport CONDA_PREFIX PYTHONPATH PYTHONHOME

.PHONY: help demo test begin combinations rows lint lint-rust lint-python test-rust test-oracles test-asan test-python test-kernel guest-uml stubtest bench mutants mutants-rust coverage deep judge fuzz storm \
	wheel clean clean-guests toolchain guest-packages

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# ---------------------------------------------------------------------------------------------- the two commands

demo: $(VENV)/.core ## build, install in .venv and run one request from the driver to the device and back
	@echo
	@$(BIN)/virtio-test request 10

test: begin test-rust test-oracles test-asan stubtest test-python test-kernel ## every test, those with real kernels and real devices included
	$(BIN)/python -m tests.combinations check

# What ran with what is written down from here on.
begin: | $(BIN)/python
	@$(BIN)/python -m tests.combinations clean

combinations: begin test-python test-kernel ## write docs/combinations.md from a run of the tests
	$(BIN)/python -m tests.combinations write

rows: $(VENV)/.core ## write docs/rows.md from what the package says of the robustness catalogue
	$(BIN)/python -m tests.rows write

# ------------------------------------------------------------------------------------------------------- in parts

lint: lint-rust lint-python stubtest ## rustfmt, clippy, ruff, pyright (strict) and stubtest

# PyO3 asks an interpreter how it is built, hence the environment.
lint-rust: | toolchain $(BIN)/python
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo fmt --check --manifest-path benches/rust/Cargo.toml
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy $(ORACLES) --all-targets -- -D warnings
	cargo clippy $(BENCHES) --all-targets -- -D warnings

lint-python: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --warnings

stubtest: $(VENV)/.core $(VENV)/.dev ## the stub of the core against the core
	$(BIN)/stubtest virtio_test._core --mypy-config-file pyproject.toml

test-rust: | toolchain ## the core without Python
	cargo test --locked --no-default-features

# Crates of their own, outside the package: what they depend on is nobody else's business.
BENCHES := --locked --manifest-path benches/rust/Cargo.toml --target-dir target/benches
ORACLES := --locked --manifest-path fuzz/Cargo.toml --target-dir target/oracles --no-default-features
test-oracles: | toolchain ## what the fuzzers judge by, on made-up inputs; the virtio-queue crate beside our device end
	cargo test $(ORACLES)

# RUSTC_BOOTSTRAP lets the stable compiler take -Z; a target directory of its own keeps the plain build warm.
test-asan: | toolchain ## the same under AddressSanitizer
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address RUSTDOCFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan \
		cargo test --locked --no-default-features --target "$$(rustc -vV | sed -n 's/^host: //p')"

# Where rings and programs that made a test fail are kept as JSON; what is worth it moves to tests/corpus.
FOUND := --virtio-corpus=.hypothesis/virtio-corpus

# What the benches' smoke tests run is built before pytest starts, so that no test's time limit runs meanwhile.
test-python: $(VENV)/.core $(VENV)/.dev | toolchain ## the Python tests that need no guest
	cargo build $(BENCHES) --release --quiet
	$(BIN)/pytest -n $(JOBS) -m "not kernel and not peers" --hypothesis-profile=virtio-ci $(FOUND)

# A million cases in all, beside what the profile multiplies; a test alone may take long here.
deep: $(VENV)/.core $(VENV)/.dev ## the properties with the deep profile, and the tests that take long (an hour)
	$(BIN)/pytest -n $(JOBS) -m "not deep" --timeout=7200 -o faulthandler_timeout=7200 --hypothesis-profile=virtio-deep $(FOUND) tests/property
	$(BIN)/pytest -n $(JOBS) -m deep --timeout=7200 -o faulthandler_timeout=7200 --hypothesis-profile=virtio-deep $(FOUND)

mutants: $(VENV)/.core $(VENV)/.dev ## each check of the Python protocol code changed once: a test must notice (hours; in part: python -m tests.mutants MODULE; what is none: tests/mutants.txt)
	$(BIN)/python -m tests.mutants --jobs $(JOBS)

# Kernels and QEMU are built and fetched before pytest starts, so that no test's time limit runs meanwhile.
test-kernel: $(VENV)/.core $(VENV)/.dev guest-packages ## real Linux as the guest, and real devices before our drivers
	$(BIN)/python -m tests.kernel.build all
	$(BIN)/python -m tests.peers.reference --fetch
	$(BIN)/pytest -m "kernel or peers" --hypothesis-profile=virtio-ci

guest-uml: $(BIN)/python guest-packages ## the user-mode Linux kernel and our driver module, cached
	$(BIN)/python -m tests.kernel.build uml

# NAMES="handlers net" measures a part; docs/benches.md says what each pair means.
NAMES ?=
# Instructions are counted too where valgrind is installed.
bench: $(VENV)/.core $(VENV)/.dev | toolchain ## what things cost beside their peers, as ratios (10 minutes; NAMES='handlers' a part)
	$(BIN)/python -m benches $(NAMES) $(if $(shell command -v valgrind),--instructions)

# Fetched into the cache: the programs of two Debians. ONLY=NAME and ROW=ID judge a part, and leave the page as it is.
judge: $(VENV)/.core $(VENV)/.dev guest-packages ## other people's devices before our broken rings; writes docs/judge.md
	$(BIN)/python -m tests.peers.reference $(ONLY:%=--only %) $(ROW:%=--row %)

# cargo-fuzz is installed in target/, for this tree only. Corpus and findings stay there too, out of the repository.
# Seeds are the frozen cases of tests/corpus. SANITIZER=none is four times as fast as address.
TIME ?= 60
SANITIZER ?= address
TARGETS ?= device_split device_packed driver_end inflight_record tables state differential
CODECS ?= vhost_user vfio_user inflight case uml saved
fuzz: $(VENV)/.core $(VENV)/.dev | toolchain target/tools/bin/cargo-fuzz ## libFuzzer against core and codecs, TIME=60 seconds for each of TARGETS and CODECS
	$(BIN)/python -m fuzz.seeds target/corpus
	for target in $(TARGETS); do \
		mkdir -p target/corpus/$$target target/findings/$$target; \
		RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=target/fuzz-$(SANITIZER) PATH="$(CURDIR)/target/tools/bin:$$PATH" \
			cargo fuzz run --fuzz-dir fuzz -O -a -s $(SANITIZER) $$target target/corpus/$$target -- -max_total_time=$(TIME) \
			-max_len=1400 -print_final_stats=1 -artifact_prefix=target/findings/$$target/; \
	done
	$(BIN)/pip install --quiet --requirement fuzz/requirements.txt
	for target in $(CODECS); do $(BIN)/python -m fuzz.python $$target $(TIME); done

# Without libFuzzer and its counters: what the corpus holds, changed at random, as fast as it goes.
storm: | toolchain ## the same inputs changed at random, without libFuzzer, TIME=60 seconds for each of TARGETS
	cargo build $(ORACLES) --release --example storm
	for target in $(TARGETS); do target/oracles/release/examples/storm $$target $(TIME) $$RANDOM target/corpus/$$target; done

target/tools/bin/cargo-fuzz: | toolchain
	@command -v c++ >/dev/null || tools/debian-packages g++
	cargo install --quiet --locked --root target/tools cargo-fuzz

COVER ?=
coverage: | toolchain ## lines of the core that the Rust tests reach; COVER='tests/property' adds those of Python tests
	tools/coverage $(COVER)

# The Rust tests are the judge. FILES='queue ring/split' takes a part, by what stands in a file's path.
FILES ?=
mutants-rust: $(VENV)/.dev | toolchain ## each check of the core changed once: a Rust test must notice (long; FILES='queue' a part)
	$(BIN)/python -m tests.mutants_rust --jobs $(JOBS) $(FILES)

wheel: $(VENV)/.tools ## a wheel for this Python, one for every Python from 3.11 on, and the sdist, in dist/
	$(BIN)/maturin build --locked --release --out dist
	$(BIN)/maturin build --locked --release --out dist --features abi3
	$(BIN)/maturin sdist --out dist

clean: ## remove everything that was built in this folder, .venv included
	rm -rf target .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests examples guest -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/virtio_test/_core.*.so

clean-guests: ## remove the cache of kernels and QEMU
	$(PYTHON) -m tests.kernel.build clean

# --------------------------------------------------------------------------------------------------------- set-up

toolchain:
	@command -v cargo >/dev/null || \
		{ echo "make: no cargo found: install Rust 1.85 or newer (rustup), then run make again" >&2; exit 1; }
	@command -v cc >/dev/null || tools/debian-packages gcc libc6-dev

guest-packages:
	@tools/debian-packages --from guest/debian-packages.txt --known linux-source-6.1 --known linux-image-cloud-amd64

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: '$(PYTHON)' is no Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tools/debian-packages python3-venv
	$(PYTHON) -m venv $(VENV)

# What the demo needs is little; what the tests need comes on top. Versions stand in one file for both.
$(VENV)/.tools: requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint $< click maturin rich
	@touch $@

$(VENV)/.dev: requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install --quiet --requirement $<
	@touch $@

# A release build for the tests too: it is what users get, and it keeps its overflow checks.
$(VENV)/.core: $(RUST) pyproject.toml | $(VENV)/.tools toolchain
	$(BIN)/maturin develop --locked --release
	@touch $@
