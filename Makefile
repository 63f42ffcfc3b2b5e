# `make compare` and `make test` need Linux, Python 3.11+ and a package index; nothing else is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: compare test lint claims bench clean

compare: $(VENV)/.installed
	$(BIN)/dx compare gpt gpt+dyt gpt+alibi

test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(VENV)/.tested
	$(BIN)/python -m benchmarks

# One constraints file, in the variable too: only the variable reaches pip's isolated builds.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --progress-bar off -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --progress-bar off -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
