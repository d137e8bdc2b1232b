# Two commands from a fresh clone: `make demo` and `make test`. Both set up everything they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH ?= build/bench-quick

.PHONY: help demo test test-fast lint docs bench-quick clean

help:
	@echo "make demo         set up $(VENV) and run the demo (DEMO=\"--heal-tokens 60000\" for options)"
	@echo "make test         set up for development and run all tests, the fast ones first (TESTS=tests/test_planner.py for a part)"
	@echo "make test-fast    the fast ones alone, for daily use"
	@echo "make lint         ruff, mypy, and the arrows between the rooms"
	@echo "make docs         the documentation as a site in build/site"
	@echo "make bench-quick  every benchmark on tiny sizes: does it run? (results in $(BENCH))"
	@echo "make clean        remove $(VENV) and what the demo wrote"

demo: $(VENV)/.ready
	$(BIN)/kronfold demo $(DEMO)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(TESTS)

test-fast: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

bench-quick: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/bench.py --quick --overwrite --threads 2 -o $(BENCH) all

clean:
	rm -rf $(VENV) kronfold-demo

$(VENV)/.ready: pyproject.toml scripts/setup_venv.py
	$(PYTHON) scripts/setup_venv.py $(VENV)
	touch $@

$(VENV)/.ready-dev: pyproject.toml scripts/setup_venv.py
	$(PYTHON) scripts/setup_venv.py $(VENV) dev
	touch $@ $(VENV)/.ready
