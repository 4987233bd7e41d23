# spa-lite. `make run` aligns the built-in lesson model; `make help` lists the rest.
# ARGS goes on to the program: make run ARGS="--rounds 1", make test ARGS="-k judge -x".

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
PEERS ?= .venv-peers
SUITES = step score sample round head
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
ARGS ?=

# MLX's own matrix library is slow on Linux. Debian's (package libopenblas0-pthread), where it is installed, takes its
# place in the tests. It reads its number of threads when it is loaded, before tests/conftest.py can say one.
OPENBLAS = $(wildcard /usr/lib/$(shell uname -m)-linux-gnu/openblas-pthread/libopenblas.so.0)
PRELOAD = $(if $(OPENBLAS),OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1} LD_PRELOAD=$(OPENBLAS)$${LD_PRELOAD:+:$$LD_PRELOAD} )

# Of llama.cpp only the library is compiled: its programs and tests would take as long again.
LLAMA_CPP = $(foreach part,LLAVA_BUILD LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TESTS LLAMA_BUILD_SERVER,-D$(part)=OFF)

# A process per core, the tests of a file in one of them: what a file makes for all its tests is made once.
PARALLEL = --numprocesses logical --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run test test-long gguf test-gguf lint fix bench bench-speed peers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/run.stamp ## the built-in lesson, from seed pairs to report
	$(VENV)/bin/spa-lite run $(ARGS)

test: $(VENV)/dev.stamp ## the tests that take seconds
	$(PRELOAD)$(VENV)/bin/python -m pytest $(PARALLEL) -m "not long" $(ARGS)

test-long: $(VENV)/dev.stamp ## the tests that take minutes
	$(PRELOAD)$(VENV)/bin/python -m pytest $(PARALLEL) -m long $(ARGS)

gguf: $(VENV)/gguf.stamp ## llama.cpp, compiled: 6 minutes on two cores, once

test-gguf: $(VENV)/gguf.stamp ## the tests that need llama.cpp
	$(PRELOAD)$(VENV)/bin/python -m pytest $(PARALLEL) -m gguf $(ARGS)

lint: $(VENV)/dev.stamp ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fix: $(VENV)/dev.stamp ## mend style and format in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/dev.stamp bench-speed ## all benchmarks, one after the other
	@for file in $(filter-out $(SUITES:%=benchmarks/bench_%.py) benchmarks/bench_mlx_%.py,$(sort $(wildcard benchmarks/bench_*.py))); do \
		echo "== $$file"; $(VENV)/bin/python $$file $(ARGS) || exit 1; done

peers: $(PEERS)/peers.stamp ## an environment with the tools that bench-speed compares with

bench-speed: $(PEERS)/peers.stamp ## speed against other tools, then docs/speed.md
	@for suite in $(SUITES); do $(PEERS)/bin/python benchmarks/bench_$$suite.py $(ARGS) || exit 1; done
	@if $(PEERS)/bin/python -c 'import mlx.core' 2>/dev/null; then for suite in mlx_step mlx_sample; do \
		$(PRELOAD)$(PEERS)/bin/python benchmarks/bench_$$suite.py $(ARGS) || exit 1; done; \
		else echo "MLX is not installed here, so its suites are left out"; fi
	@$(PEERS)/bin/python benchmarks/side_by_side.py --page

clean: ## remove the environment, builds and caches (runs stay)
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, and again when a requirement changes; after that no network is needed.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "spa-lite needs Python 3.11, 3.12 or 3.13, and none was found." \
		"Install one, or name it: make run PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing spa-lite into $(VENV): up to 1.5 GB, once."
	$(PIP) --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing spa-lite and its development tools into $(VENV): up to 1.6 GB, once."
	@$(PIP) --editable ".[dev,mlx]" || { \
		echo "MLX cannot be installed here (see above; on Linux it needs glibc 2.35): going on without it and its tests."; \
		$(PIP) --editable ".[dev]"; }
	@touch $@ $(VENV)/run.stamp

# pip keeps the wheel that it compiles, so that the next environment has it in seconds.
$(VENV)/gguf.stamp: $(VENV)/dev.stamp
	@echo "Compiling llama.cpp into $(VENV): some 6 minutes on two cores, once."
	@CMAKE_ARGS="$(LLAMA_CPP)" $(PIP) --editable ".[gguf]"
	@touch $@

$(PEERS)/peers.stamp: pyproject.toml constraints.txt benchmarks/peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "Installing spa-lite and its peers into $(PEERS): up to 1.6 GB, once."
	@$(PIP:$(VENV)/%=$(PEERS)/%) --editable ".[mlx]" --requirement benchmarks/peers.txt || \
		$(PIP:$(VENV)/%=$(PEERS)/%) --editable . $$(grep '^trl' benchmarks/peers.txt)
	@touch $@
