# bench and test do all set-up themselves, once: a virtual environment in .venv, refreshed when
# pyproject.toml changes.
#
#   PYTHON  the interpreter the environment is made from; when it has torch, that torch is used
#   TORCH   what is installed when it has none
#   OUT     where `make bench` puts its results

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= out/smoke-$(shell date -u +%Y%m%dT%H%M%SZ)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
# one time stamp for the whole run
OUT := $(OUT)

.PHONY: help bench test check docs clean

help:
	@echo "make bench   measure the smoke suite on this machine: table, figures, report"
	@echo "make test    lint, types and tests"
	@echo "make check   lint and types only"
	@echo "make docs    check that the documents name what exists and their links resolve"
	@echo "make clean   remove the environment and build products; results under out/ stay"

bench: $(VENV)/.installed
	@code=0; \
	$(BIN)/cx run --suite smoke --out "$(OUT)" || code=$$?; \
	test -f "$(OUT)/manifest.json" || exit $$code; \
	$(BIN)/cx plot "$(OUT)" --out "$(OUT)" || test $$code -ne 0 || code=1; \
	echo; \
	echo "results  $(OUT)/cells"; \
	echo "figures  $(OUT)/figures"; \
	echo "report   $(OUT)/report.html"; \
	exit $$code

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

check: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.developing
	$(BIN)/python -m pytest -q tests/test_house.py -k "readme or document"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# An environment that can import torch: the one PYTHON has, else TORCH.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: CollectiveX needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; \
	    echo "hint: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@echo "making $(VENV)"
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  $(PYTHON) -m venv --clear --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo "using the torch of $(PYTHON)"; \
	else \
	  echo "installing $(TORCH), once; this can take minutes"; \
	  $(PIP) install "$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	@echo "installing CollectiveX"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.developing: pyproject.toml | $(VENV)/.torch
	@echo "installing CollectiveX and the development tools"
	@$(PIP) install --editable ".[dev]"
	@touch $@ $(VENV)/.installed
