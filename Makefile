# The commands of this project; people and CI call the same ones.

PYTHON ?= python3
ROUNDS ?= 5
WORKERS ?= 256
SECONDS ?= 180
SEED ?=
RELEASE ?=
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
# The CPU kernels are compiled when the package is installed.
DEPENDENCIES := pyproject.toml constraints.txt $(wildcard model/kernels/*)

.DEFAULT_GOAL := help
.PHONY: help install run test lint types bench fleet chaos drill audit clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## make .venv with everything that development needs

run: $(VENV)/.run ## see it work: real sentences through Redis, a worker and all-mpnet-base-v2
	@$(VENV)/bin/embedq demo

test: $(VENV)/.dev ## the whole test suite
	@$(VENV)/bin/python -m pytest

lint: $(VENV)/.dev ## ruff, rules and format
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev build/typing ## mypy --strict
	@$(VENV)/bin/mypy

bench: $(VENV)/.dev ## throughput of queue and encoder, side by side with their peers; ROUNDS=5
	@$(VENV)/bin/python -m tests.bench.run --rounds $(ROUNDS)

fleet: $(VENV)/.dev ## simulate fleets of GPU workers at one Redis: what a fleet needs; WORKERS=256
	@$(VENV)/bin/python -m tests.bench.fleet_simulation --workers $(WORKERS)

chaos: $(VENV)/.dev ## kill workers and Redis at random and check every job; SECONDS=180 SEED=7 REPORT=file.md
	@$(VENV)/bin/python -m tests.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(REPORT),--report $(REPORT))

drill: $(VENV)/.dev ## restart, kill, hang and upgrade a fleet under load, and watch its metrics; RELEASE=commit REPORT=file.md
	@$(VENV)/bin/python -m tests.ops.drill $(if $(RELEASE),--release $(RELEASE)) $(if $(REPORT),--report $(REPORT))

audit: $(VENV)/.audit ## known vulnerabilities of what is pinned (pip-audit), risky code of ours (bandit)
	@$(VENV)/bin/bandit --quiet --configfile pyproject.toml --recursive producer worker model
	@echo "bandit: every finding is answered; asking for known vulnerabilities ..."
	@$(VENV)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt || { \
		echo "pip-audit: NOT clean: a vulnerability stands above, or its database was not reached or lacks a package."; exit 1; }

clean: ## remove .venv and all that was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "embedq needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python $(DEPENDENCIES)
	@echo "installing embedq into $(VENV) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[worker,embedded]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python $(DEPENDENCIES)
	@echo "installing embedq and its development tools into $(VENV) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.audit: $(VENV)/.dev
	@echo "installing bandit and pip-audit into $(VENV) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[audit]'
	@touch $@

# The folders are packages under one namespace, which type checkers find by these links alone.
build/typing:
	@mkdir -p build/typing/embedq
	@for package in producer worker model; do ln -sfn ../../../$$package build/typing/embedq/$$package; done
