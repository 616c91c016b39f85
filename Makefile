# make          set up and run the main job: launch an SNP guest on the software host
# make check    set up and pass everything: tests, types, layers, lint
# make test     the tests alone           make long   the tests that take minutes
# make bench    ratios against the peers and limits, measured side by side
# make docs     the manual as HTML in build/docs
# Needs python3 >= 3.11 and a Python package index. Uses uv where it is installed, else venv and pip.
PYTHON ?= python3
UV     := $(shell command -v uv 2>/dev/null)
B      := .venv/bin
PYTEST := $(B)/pytest -n auto

# uv brings certificates of its own; behind a proxy the ones that count are the system's, which pip takes.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif

.PHONY: all check test long types layers lint bench docs clean
all: .venv/stamp
	$(B)/softcvm boot

check: test types layers lint

test: .venv/stamp
	$(PYTEST) $(PYTESTFLAGS)

long: .venv/stamp
	$(PYTEST) -m long $(PYTESTFLAGS)

types: .venv/stamp
	$(B)/mypy

layers: .venv/stamp
	$(B)/lint-imports --no-logo

lint: .venv/stamp
	$(B)/ruff check .
	$(B)/ruff format --check .

bench: .venv/stamp
	$(B)/python -m bench $(BENCHFLAGS)

docs: .venv/docs-stamp
	$(B)/sphinx-build -q -W --keep-going -b html docs build/docs

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/stamp: pyproject.toml constraints.txt
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip install --quiet --python $(B)/python --constraints constraints.txt --group dev --editable .
else
	$(PYTHON) -m venv .venv || { echo 'on Debian: apt install python3-venv' >&2; exit 1; }
	$(B)/pip install --quiet --upgrade 'pip>=25.1'      # --group; older ones lack it
	$(B)/pip install --quiet --constraint constraints.txt --editable . --group dev
endif
	@touch $@

.venv/docs-stamp: .venv/stamp
ifneq ($(UV),)
	$(UV) pip install --quiet --python $(B)/python --constraints constraints.txt --group docs
else
	$(B)/pip install --quiet --constraint constraints.txt --group docs
endif
	@touch $@
