# Needs a Python of at least 3.10 and nothing else. `make PYTHON=python3.12 test` picks another than python3.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# Tests wait about as long as they work, so two workers keep one CPU busy.
WORKERS ?= $(shell echo $$(( 2 * $$(nproc) > 16 ? 16 : 2 * $$(nproc) )))
PYTEST := $(BIN)/python -m pytest --workers $(WORKERS)

.PHONY: help setup demo lint test test-rest test-all matrix docs docs-serve slow soak bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(INSTALLED) ## make .venv with the package (editable) and all that tests need

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("gpu-launcher needs Python 3.10 or newer, and \
	$(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## sweep over the example, on this machine's GPUs or else on four simulated ones
	@devices=auto; \
	$(BIN)/python -c 'import pynvml; pynvml.nvmlInit(); assert pynvml.nvmlDeviceGetCount()' 2>/dev/null \
	  || devices=simulated:4; \
	set -x; \
	$(BIN)/python examples/digits/train.py -m hydra/launcher=gpu_pool hydra.launcher.devices=$$devices \
	  lr=1e-3,1e-4 hidden=32,64

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint ## lint, and the quick tests: each part and each way in
	@$(PIP) list --format=freeze 2>/dev/null | paste -sd ' '
	$(PYTEST) -m 'smoke or not (thorough or slow)' $(ARGS)

test-rest: $(INSTALLED) ## the thorough tests, which make test leaves out
	$(PYTEST) -m 'thorough and not (smoke or slow)' $(ARGS)

test-all: test test-rest ## both: all tests but those for which make matrix has its own environments

matrix: $(INSTALLED) ## tests of installed packages on four Pythons, with the newest and the lowest dependencies
	$(BIN)/python tools/matrix.py $(MATRIX)

docs: $(INSTALLED) ## the documentation site, in build/docs; a warning, a dead link or a dead anchor is an error
	$(PIP) install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going --quiet -c docs . build/docs

docs-serve: docs ## make the site, and serve it on http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8000

slow: $(INSTALLED) ## the slow tests: minutes of random kills, 100,000 entries in a pool
	$(BIN)/python -m pytest -m slow $(ARGS)

soak: $(INSTALLED) ## 5000 jobs that die in every way: ten minutes, then nothing may be left or have grown
	$(BIN)/python tools/soak.py

bench: $(INSTALLED) ## the benchmarks, each against the launchers it is compared with
	$(PIP) install --quiet '.[bench]'
	$(BIN)/python benchmarks/launch_overhead.py
	$(BIN)/python benchmarks/async_vs_batch.py
	$(BIN)/python benchmarks/reporting.py
	$(BIN)/python benchmarks/nodes.py
	$(BIN)/python benchmarks/steering.py
	$(BIN)/python benchmarks/web.py
	$(BIN)/python benchmarks/functions.py --rounds 1
	$(BIN)/python benchmarks/functions_map.py
	$(BIN)/python benchmarks/functions.py

clean: ## remove what make made
	rm -rf $(VENV) .matrix build dist outputs multirun
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
