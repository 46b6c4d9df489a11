# make demo: the main job on a CPU. make test: the tests. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check
demo: .venv/installed
	$(BIN)/python scripts/reproduce.py demo --results outputs/demo
	$(BIN)/python scripts/make_tables.py demo --results outputs/demo --output outputs/demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[suite]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@
