# clsa: `make chat` builds and starts a chat, `make test` runs every test, `make help` lists the rest.
# Variables: PORTABLE=1 (any x86-64-v3 machine), PREFIX=/usr/local (make install), MODEL=FILE (make chat), CARGO_FLAGS=...

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

MODEL ?= models/smol-clsa-135m.gguf
MESSAGE ?= Give me three tips for writing clear documentation.
PREFIX ?= $(HOME)/.local
CARGO ?= cargo
CARGO_FLAGS ?=

# cargo of a fresh rustup installation is not on the PATH of a shell opened before.
export PATH := $(PATH):$(HOME)/.cargo/bin
# CI machines run without the history that makes incremental builds pay.
ifdef CI
export CARGO_INCREMENTAL := 0
endif

ifdef PORTABLE
# Overrides target-cpu=native of .cargo/config.toml; ggml is built for the same CPU.
export RUSTFLAGS := -C target-cpu=x86-64-v3
export CARGO_TARGET_DIR := target-portable
endif
TARGET := $(or $(CARGO_TARGET_DIR),target)
CLSA := $(TARGET)/release/clsa
PYTHON := .venv/bin/python

.PHONY: quality build chat test test-slow golden lint bench-smoke bench-gpu kernels format install python cuda-toolkit build-deps help

## Build the release binary; installs missing build tools (cmake, clang, libclang) through apt
build: build-deps
	$(CARGO) build --release --bins $(CARGO_FLAGS)

build-deps:
	@tools/build-deps build

## Build and chat with the bundled model (MODEL=FILE for another); one answer to MESSAGE when there is no terminal
chat: build
	@if [ -t 0 ]; then \
	    exec $(CLSA) chat -m "$(MODEL)"; \
	else \
	    exec $(CLSA) chat -m "$(MODEL)" --single-turn -n 256 -p "$(MESSAGE)"; \
	fi

## Run every test but the slow ones
test: build-deps python
	$(CARGO) test --release --workspace $(CARGO_FLAGS)
	$(CARGO) test --release --test python $(CARGO_FLAGS) -- --ignored
	CLSA_CUDA=off $(CARGO) test --release -p ggml-kernels --features cuda-emulator --test cuda_kernels $(CARGO_FLAGS)
	CLSA_CUDA=off $(CARGO) test --release -p ggml-kernels --features amx-emulator --test matmul --test ops $(CARGO_FLAGS)
	$(PYTHON) tests/golden/make.py --check

## Run the slow tests (make test runs the others)
test-slow: build-deps python
	$(CARGO) test --release --workspace $(CARGO_FLAGS) -- --ignored

## Compare with goldens of a real checkpoint: CHECKPOINT=DIR with golden.json and golden_topk.json
golden: build-deps python
	@if [ -z "$(CHECKPOINT)" ]; then echo "make golden needs CHECKPOINT=DIR: a checkpoint folder with golden.json" >&2; exit 2; fi
	@dir="$(CHECKPOINT)"; \
	if [ -f "$$dir/expand.py" ]; then \
	    dir="$(abspath $(TARGET))/golden-checkpoint"; \
	    $(PYTHON) "$(CHECKPOINT)/expand.py" "$$dir"; \
	    cp "$(CHECKPOINT)"/golden*.json "$$dir"; \
	fi; \
	CLSA_GOLDEN_CHECKPOINT="$$dir" $(CARGO) test --release --test golden_checkpoint $(CARGO_FLAGS) -- --include-ignored --nocapture \
	    --test-threads 1

# Measures the tables of docs/quality.md again: CHECKPOINT=DIR; goes on where it was cut off (target/quality). About an hour on two cores.
quality: build python
	@if [ -z "$(CHECKPOINT)" ]; then echo "make quality needs CHECKPOINT=DIR: the checkpoint folder" >&2; exit 2; fi
	$(PYTHON) tools/quality --checkpoint "$(CHECKPOINT)" --clsa $(CLSA) --jobs $$(nproc) --write

## Check formatting and lints of Rust, C and CUDA sources
lint: build-deps
	@tools/build-deps lint
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets $(CARGO_FLAGS) -- -D warnings
	tools/format-c --check

## Compile every GPU kernel for the oldest target and for Hopper (CLSA_CUDA_ARCHS for others); runs on no GPU
kernels: build-deps
	@[ -x "$${CUDA_HOME:-/nonexistent}/bin/nvcc" ] || command -v nvcc > /dev/null || compgen -G '.venv-cuda/lib/*/site-packages/nvidia/cu13/bin/nvcc' > /dev/null || \
	    { echo "no nvcc was found: set CUDA_HOME or run make cuda-toolkit" >&2; exit 1; }
	CLSA_CUDA_ARCHS="$${CLSA_CUDA_ARCHS:-80 90a}" $(CARGO) build --release -p ggml-kernels $(CARGO_FLAGS)

## Run the benchmarks on tiny models: fails when a result is wrong, not when it is slow; then count the C kernels' instructions
bench-smoke: build
	@tools/build-deps bench
	tools/bench-smoke $(CLSA)
	tools/instruction-counts

## Time every GPU kernel against its limit; results are checked first
bench-gpu: build-deps
	$(CARGO) bench -p ggml-kernels --bench cuda_matmul --bench cuda_ops $(CARGO_FLAGS)

## Format Rust, C and CUDA sources
format:
	$(CARGO) fmt --all
	tools/format-c

## Install the binary and the bundled model under PREFIX
install: build
	install -Dm755 $(CLSA) "$(DESTDIR)$(PREFIX)/bin/clsa"
	install -Dm644 models/smol-clsa-135m.gguf "$(DESTDIR)$(PREFIX)/share/clsa/models/smol-clsa-135m.gguf"

## Make .venv with the Python packages that the tests compare with
python:
	@tools/python-env

## Install NVIDIA's CUDA compiler from PyPI into .venv-cuda, for machines without a CUDA toolkit
cuda-toolkit:
	tools/cuda-toolkit

## List the targets
help:
	@awk '/^## /{doc=substr($$0,4); next} /^[a-z-]+:/{if (doc != "") {split($$1,n,":"); printf "  make %-14s %s\n", n[1], doc}} {doc=""}' $(MAKEFILE_LIST)
