# The only entry point. `make help` lists the targets; each says in one line what it does.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Profile of the binaries: dev for building and testing (optimised dependencies, fast to build), release for measuring.
PROFILE ?= dev
SECONDS_OF_CHAOS ?= 120
# In one go: another set of packages has other features, and builds everything again.
BUILT ?= -p lakebase -p vfs

# rustup's own installer puts cargo there without touching the shell's start files.
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO := cargo --locked
ENGINE := cd engine &&
WITH_ENV := source build/env.sh &&
VENV := operator/.venv/bin

.PHONY: help setup build fmt lint check demo test sim fuzz bench soak clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make this machine ready (Debian 12 or 13; idempotent, says what it does)
	@scripts/setup

build: ## Build the engine (PROFILE=dev or release) and write build/env.sh
	@[ -f build/setup.env ] || scripts/setup
	$(ENGINE) $(CARGO) build --profile $(PROFILE) $(BUILT)
	$(ENGINE) $(CARGO) build --profile $(PROFILE) -p redo --examples
	@scripts/env $(PROFILE)

fmt: ## Format Rust and Python
	$(ENGINE) cargo fmt --all
	$(VENV)/ruff check --fix --quiet operator tests --config operator/pyproject.toml || true
	$(VENV)/ruff format --quiet operator tests --config operator/pyproject.toml

lint: build ## Formatting, clippy, types, layers: everything a reviewer should not have to say
	@scripts/lint

check: lint ## The quick loop before a commit: lint, Rust and Python unit tests
	@scripts/test rust python

demo: build ## Three safekeepers, pgbench; a safekeeper and the writer die; what was acknowledged is found again
	@$(WITH_ENV) PYTHONPATH=tests python -m demo

test: setup build ## Everything that must hold: set-up, build, lint and all suites (ONLY="rust integration" for some)
	@scripts/test $(ONLY)

sim: ## Simulation: SEEDS=n runs n seeds, SEED=x replays one exactly
	$(ENGINE) $(CARGO) run --release -p sim -- $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000))

fuzz: ## Fuzz every decoder: FUZZ_SECONDS for each target
	@scripts/fuzz $(or $(FUZZ_SECONDS),30)

bench: ## Ratios against real references, as a table and in build/bench/ (ONLY="P2 P3" for some)
	@$(MAKE) build PROFILE=release BUILT="-p lakebase -p vfs -p append-load -p page-load -p redo-load"
	@$(WITH_ENV) PYTHONPATH=tests python -m bench $(ONLY)

soak: ## The long runs: PostgreSQL's suites against our decoder, redo and shards, 1.5 GB imported and exported, consensus to its full bounds, ten minutes of chaos without and with page servers, 200 fenced reads
	@$(MAKE) build PROFILE=release
	@rm -rf build/regress-wal
	@$(WITH_ENV) tests/wal/regress_wal.sh build/regress-wal
	@$(WITH_ENV) cd engine && LAKEBASE_TEST_WAL=$(CURDIR)/build/regress-wal $(CARGO) test --release -p wal --test pg_waldump
	@$(WITH_ENV) cd engine && $(CARGO) test --release -p redo --features suites --test consistency
	@$(WITH_ENV) cd engine && $(CARGO) test --release -p shard --features suites --test whole_server
	@$(WITH_ENV) cd engine && LAKEBASE_RECOVERIES=100 $(CARGO) test --release -p metadata --test files_of_a_server -- --nocapture
	@$(WITH_ENV) cd engine && LAKEBASE_RECOVERIES=100 $(CARGO) test --release -p shard --test recoveries -- --nocapture
	$(ENGINE) LAKEBASE_EXHAUSTIVE=full $(CARGO) test --release -p consensus --test exhaustive -- --nocapture
	@$(WITH_ENV) PYTHONPATH=tests LAKEBASE_TRANSFER_SCALE=100 pytest -c operator/pyproject.toml --rootdir operator -v \
	  tests/integration/test_import_export.py -k comes_out
	@$(WITH_ENV) LAKEBASE_SOAK=1 LAKEBASE_ATTACK_SEEDS=5 pytest -c operator/pyproject.toml --rootdir operator -v \
	  tests/integration/test_suites_on_pages.py tests/integration/test_attack_*.py
	@$(WITH_ENV) PYTHONPATH=tests python -m chaos --seconds 600
	@$(WITH_ENV) PYTHONPATH=tests python -m chaos --page-servers 4 --seconds 600
	@$(WITH_ENV) PYTHONPATH=tests python -m chaos.fenced_reads --repetitions 200

clean: ## Remove what was built; set-up and downloads stay (rm -rf build removes those, too)
	$(ENGINE) cargo clean
	rm -rf build/test build/bench build/env.sh operator/.ruff_cache operator/.pytest_cache .pytest_cache
