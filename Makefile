# Two commands from a fresh clone: `make demo` and `make test`. Both set up everything they need in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.ready
	$(BIN)/kronfold demo $(DEMO)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) kronfold-demo

$(VENV)/.ready: pyproject.toml scripts/setup_venv.py
	$(PYTHON) scripts/setup_venv.py $(VENV)
	touch $@

$(VENV)/.ready-dev: pyproject.toml scripts/setup_venv.py
	$(PYTHON) scripts/setup_venv.py $(VENV) dev
	touch $@ $(VENV)/.ready
