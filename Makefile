# make demo   install into .venv and run the demonstration on the embedded model
# make test   install what the tests need and run ruff, mypy and pytest
# make test-oldest   run what depends on transformers with the oldest version that is allowed
# make clean  remove the virtual environments and the demo's output

# The first of these that is Python 3.11+ and can make virtual environments; override with PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)

VENV := .venv
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-oldest clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/tpa-convert run recipes/demo.yaml

# Two workers with one thread each: tiny models gain nothing from more threads. Files stay whole, so
# that what their tests share is made once, and in their order: by the number of tests, which is the
# default, the longest of all would come last.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Models, caches, exports and the walk through a source are what a version of transformers can break.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		tests/test_coded_generation.py tests/test_families.py tests/test_families_coded.py \
		tests/test_family_configs.py tests/test_legacy.py tests/test_paged.py \
		tests/test_remote_code.py tests/test_serving.py tests/test_walk.py

clean:
	rm -rf $(VENV) $(OLDEST) .work

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
	$(PIP_INSTALL) -e '.[gguf,data,lora,eval,logs,serve,dev]'
	@touch $@

# Everything but transformers, and what that asks for, is taken from the other environment.
$(OLDEST)/.installed: $(VENV)/.installed-dev
	rm -rf $(OLDEST)
	$(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))' \
		> $$(ls -d $(OLDEST)/lib/python3*/site-packages)/base.pth
	$(BIN)/python -m pip --python $(OLDEST)/bin/python install --quiet \
		--disable-pip-version-check 'transformers==$(OLDEST_TRANSFORMERS).*'
	@touch $@
