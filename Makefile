# The two commands of the README. Both build the local environment first; nothing else is needed.
#
#   make leaderboard                 the embedded track; TRACK=smoke another one
#   make test                        all tests
#   make test TESTS='-m "not slow"' PYTHON=python3.13 VENV=.venv-3.13     some, on another Python
PYTHON ?= python3.11
VENV ?= .venv
TRACK ?= embedded
TESTS ?=
UV_VERSION := 0.13.8
BIN := $(VENV)/bin
# Bytecode is compiled once at installation: importing torch then takes half the time in every job.
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy

.PHONY: leaderboard test lint environment writable lock clean

leaderboard: writable environment
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all --config track=$(TRACK)

test: writable environment
	PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 3 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: environment
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

environment: $(VENV)/installed

# Snakemake and uv keep caches below HOME and end in tracebacks where nothing can be written there.
writable:
	@folder="$${XDG_CACHE_HOME:-$$HOME/.cache}"; mkdir -p "$$folder" 2>/dev/null && \
	    probe=$$(mktemp -p "$$folder" 2>/dev/null) && echo 1 2>/dev/null >"$$probe" && \
	    rm -f "$$probe" || { rm -f "$$probe"; echo "$$folder can't be written, where Snakemake and uv" \
	    "keep their caches: free space, or name another folder:" \
	    "XDG_CACHE_HOME=/path/to/folder make $(MAKECMDGOALS)" >&2; exit 1; }

$(VENV)/installed: pyproject.toml requirements.lock Makefile
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.11 or name" \
	    "another up to 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/uv || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# Resolves what pyproject.toml asks for and keeps what is locked where it fits; `make lock UPGRADE=1`
# resolves everything anew. Commit the result, which holds hashes and no addresses, and serves every
# Python of pyproject.toml.
lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --generate-hashes \
	    --no-emit-index-url $(if $(UPGRADE),--upgrade) --output-file requirements.lock

clean:
	rm -rf runs .snakemake
