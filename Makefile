# Two commands: `make demo` and `make test`. Both build .venv first, once.
# A stamp is written only after a whole installation; a .venv without it is a killed one and is rebuilt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TESTED := $(VENV)/.ready-test
UV     := UV_SYSTEM_CERTS=1 VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv

#: Processes that share the tests.
JOBS   ?= 2

.PHONY: demo test lint types unit wheel clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/certify demo

test: lint types unit

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTED)
	$(BIN)/mypy

unit: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# Install the built wheel into a folder of its own and use it from elsewhere, with the environment's dependencies.
wheel: $(TESTED)
	rm -rf build/wheel build/target
	$(UV) build --quiet --wheel --out-dir build/wheel .
	$(UV) pip install --quiet --no-deps --target build/target build/wheel/*.whl
	cd build && PYTHONPATH=$(CURDIR)/build/target $(CURDIR)/$(BIN)/python -P -m cli demo --quick --out demo
	cd build && PYTHONPATH=$(CURDIR)/build/target $(CURDIR)/$(BIN)/python -P -c \
	  "import certify, models, analysis, cli; assert 'target' in certify.__file__, certify.__file__"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older. Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian: apt install python3-venv"; exit 1; }
	@test -e $(READY) || rm -rf $(VENV)
	@rm -f $(READY) $(TESTED)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --compile-bytecode -e .
	touch $(READY)

# auto-lirpa 0.3 pins an old torch, so it comes last and without its dependencies; only cross-checks use it.
$(TESTED): $(READY)
	$(UV) pip install --compile-bytecode -e '.[test]'
	$(UV) pip install --compile-bytecode appdirs tqdm setuptools
	$(UV) pip install --compile-bytecode --no-deps auto-lirpa==0.3
	touch $(TESTED)

clean:
	rm -rf $(VENV) build dist demo *.egg-info
