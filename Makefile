# make demo   install into .venv and run the demonstration on the embedded model
# make test   install what the tests need and run ruff, mypy and pytest
# make clean  remove the virtual environment and the demo's output

# The first of these that is Python 3.11+ and can make virtual environments; override with PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/tpa-convert run recipes/demo.yaml

# Two workers with one thread each: tiny models gain nothing from more threads.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

clean:
	rm -rf $(VENV) .work

# torch goes first and alone, so that the constraint alone chooses the build (a CPU build, where the
# configured index offers one) and nothing installed later can replace it.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11+ with venv found; install one (Debian: apt install python3-venv) or set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) -e '.[gguf,data]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[gguf,data,lora,eval,logs,dev]'
	@touch $@
