# make demo: the main job on two CPU cores in minutes. make test: the tests. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check
demo: .venv/demo
	$(BIN)/python scripts/reproduce.py demo
	$(BIN)/python scripts/make_tables.py demo

test: .venv/dev
	$(BIN)/python -m pytest -q -m "not slow"

check: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip

.venv/demo: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -e .
	touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@
