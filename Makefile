# Every target makes the virtual environment first; nothing but Python 3.11 or
# newer, make and the package index is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: train test coverage lint bench docs dist clean
.DEFAULT_GOAL := test

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m experiments.main train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

# Lines and branches that the tests run, also in build/coverage.json.
coverage: $(STAMP)
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered \
		--cov-report=json:build/coverage.json $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=. $(BIN)/pyright --verifytypes kfac_jax_lite --ignoreexternal

bench: $(STAMP)
	$(BIN)/python -m experiments.benchmarks.step_time $(ARGS)

# The site, in build/site; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and source distribution, in dist.
dist: $(STAMP)
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
