# The two commands of the README. Both build the local environment first; nothing else is needed.
PYTHON ?= python3.11
UV_VERSION := 0.13.8
BIN := .venv/bin
# Bytecode is compiled once at installation: importing torch then takes half the time in every job.
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy

.PHONY: leaderboard test lint environment lock clean

leaderboard: environment
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all

test: environment
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: environment
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

environment: .venv/installed

.venv/installed: pyproject.toml requirements.lock Makefile
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.11 or name" \
	    "it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/uv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# Resolves what pyproject.toml asks for and keeps what is locked where it fits; `make lock UPGRADE=1`
# resolves everything anew. Commit the result, which holds hashes and no addresses.
lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --generate-hashes \
	    --no-emit-index-url $(if $(UPGRADE),--upgrade) --output-file requirements.lock

clean:
	rm -rf runs .snakemake
