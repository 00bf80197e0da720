# `make demo` and `make test` each work alone on a machine with only Python 3.11+ and make.
#
# pip's own settings decide where packages come from (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf). A torch that is already
# there stays, unless it is older than pyproject.toml allows:
#   - if the machine's Python has torch, the new environment sees that Python's packages;
#   - VENV=/path/to/environment installs into an environment of your own, with its torch;
#   - .venv itself keeps its torch when the pins change, until `make clean`.
# Without one, constraints.txt decides: its exact torch matches a CPU build where pip's settings offer one.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.patchrank-installed
SYSTEM_INSTALLED := $(VENV)/.patchrank-system-installed
OUT ?= out
# Test processes; each computes on one core.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-system lint format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## the environment .venv with patchrank in it

demo: $(INSTALLED) ## rank the patches of 16 images with the embedded model; table and pictures in out/demo
	$(PY) -m patchrank.search --limit 16 --explain 4 --out $(OUT)/demo

test: $(INSTALLED) ## every test that needs no GPU, no network and no system package
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

test-system: $(SYSTEM_INSTALLED) ## whole commands end to end, one after the other
	@$(PY) -m pytest -m "system and not gpu and not network" --timeout 900 || { \
	  code=$$?; test $$code -eq 5 || exit $$code; echo "there are no system tests: nothing was tested here"; }

lint: $(INSTALLED) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED) ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED) ## kernels, search, graphs, 10 minutes of load on each server, claims: three quarters of an hour
	$(PY) -m eval kernels --out $(OUT)/kernels
	$(PY) -m eval search-cost --out $(OUT)/search-cost
	$(PY) -m export.bench --out $(OUT)/export-bench
	$(PY) -m export.load --seconds 600 --out $(OUT)/load
	$(PY) -m export.triton_repo --out $(OUT)/triton
	$(PY) tests/triton_server.py $(OUT)/triton/models --ports 8000 8001 8002 -- $(PY) -m export.load \
	  --model $(OUT)/triton/onnx --url 127.0.0.1:8000 --grpc 127.0.0.1:8001 --batch 1 1 1 4 --reload 10 --seconds 600 \
	  --out $(OUT)/load-triton || { code=$$?; test $$code -eq 2 || exit $$code; echo "Triton was not measured here"; }
	$(PY) -m eval claims --out $(OUT)/claims

clean: ## remove .venv, build leftovers and caches; out/ stays
	rm -rf .venv .venv-triton build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt .ci/keep_torch.py | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@echo "installing patchrank and what it needs into $(VENV); the first time takes a few minutes"
	$(PY) .ci/keep_torch.py > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e '.[cpu,serve,test]'
	@touch $@

# What cannot be had on this machine is skipped by name in the tests.
$(SYSTEM_INSTALLED): $(INSTALLED)
	for extra in bench pretrain openvino rtx; do \
	  $(PIP) install -c $(VENV)/constraints.txt -e ".[$$extra]" || echo "not to be had here: the extra $$extra"; done
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "error: PYTHON=$(PYTHON): is no Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  "error: PYTHON=$(PYTHON): has no venv module; install it (Debian: python3-venv) or name another Python" >&2; exit 2; }
	$(PYTHON) -m venv $$($(PYTHON) -c 'from importlib.util import find_spec as find; \
	  print("--system-site-packages" if find("torch") else "")') $(VENV)
