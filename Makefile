# Needs a Python of at least 3.10 and nothing else. `make PYTHON=python3.12 test` picks another than python3.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# Tests wait more than they work: two processes take half the time of one. These take about as long as all others.
HALF := tests/cli tests/contract tests/crash

.PHONY: help setup demo test tests-one-half tests-other-half matrix soak bench clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

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

test: $(INSTALLED) ## lint, types and all tests but the slow ones
	@$(PIP) list --format=freeze 2>/dev/null | paste -sd ' '
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@echo 'running the tests in two halves side by side; each is shown when it has ended, in some ten minutes'
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target tests-one-half tests-other-half

tests-one-half tests-other-half: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slow' $(if $(filter tests-one-half,$@),$(HALF),tests $(HALF:%=--ignore=%))

matrix: $(INSTALLED) ## the tests against installed packages, on several Pythons, with the newest and the lowest dependencies
	$(BIN)/python tools/matrix.py $(MATRIX)

soak: $(INSTALLED) ## 5000 jobs that die in every way: ten minutes, then nothing may be left or have grown
	$(BIN)/python tools/soak.py

bench: $(INSTALLED) ## the benchmarks, each against the launchers it is compared with
	$(PIP) install --quiet '.[bench]'
	$(BIN)/python benchmarks/launch_overhead.py
	$(BIN)/python benchmarks/async_vs_batch.py
	$(BIN)/python benchmarks/reporting.py
	$(BIN)/python benchmarks/functions.py --rounds 1
	$(BIN)/python benchmarks/functions_map.py
	$(BIN)/python benchmarks/functions.py

clean: ## remove what make made
	rm -rf $(VENV) .matrix build dist outputs multirun
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
