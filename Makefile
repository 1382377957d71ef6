# `make demo` and `make test` work from a fresh clone; the environment is made on first use and reused after.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: test lint protos clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server,dev]'
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	if command -v buf >/dev/null; then buf lint; fi

protos: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" proto/generate.sh

clean:
	rm -rf $(VENV) *.egg-info build
