# `make demo` and `make test` work from a fresh clone; the environment is made on first use and reused after.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench protos clean

demo: $(STAMP)
	$(BIN)/atelier demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/proto
	if command -v buf >/dev/null; then buf lint; fi

bench: $(STAMP)
	for name in svd_merge merge_methods pocket_compose stack_switch render_overhead load soak catalog transfer hub_sync merge_memory merge_peaks pocket_modes; do $(BIN)/python -m tests.bench.$$name || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,dev]'
	touch $@

protos: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" proto/generate.sh

clean:
	rm -rf $(VENV) *.egg-info build
