# `make compare` and `make test` need Linux, Python 3.11+ and a package index; nothing else is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: compare test bench clean

compare: $(VENV)/.installed
	$(BIN)/dx compare gpt gpt+dyt gpt+alibi

test: $(VENV)/.tested $(VENV)/.browser $(VENV)/.peers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(shell nproc)

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

# Debian's Chromium for the tests of the pages. Where it cannot be installed they are skipped, and say so.
$(VENV)/.browser: $(VENV)/.installed
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		{ apt-get install -qq -y --no-install-recommends chromium || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; }; } >/dev/null 2>&1; } || true
	touch $@

# torchvision for parity, in a folder of its own: importable, it would break transformers. 0.28.0 is torch 2.13's pair.
# Where it cannot be had its tests are skipped, and say so.
$(VENV)/.peers: $(VENV)/.tested
	@$(BIN)/pip install --quiet --progress-bar off --no-deps --upgrade --target $(VENV)/peers torchvision==0.28.0 \
		&& touch $@ || echo "torchvision could not be installed: parity with it is not tested"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
