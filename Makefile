# Everything a user or a developer starts. `make` alone lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# make demo EVENTS=<file or folder> FORMAT=movielens|globo|taobao|parquet|csv ARGS="..."
EVENTS ?=
FORMAT ?=
ARGS ?=
VLM_HOME ?= .vlm
PORT ?= 3000
WORKERS ?= auto

export VLM_HOME

.DEFAULT_GOAL := help
.PHONY: help setup demo ui test check format bench bench-history bench-loader clean

help: ## List what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vlm-dagster needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Installing into $(VENV) (a minute or two, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY) ## Create .venv and install the pinned dependencies

demo: $(READY) ## Events to a trained model, through Dagster, into ./.vlm
	@$(BIN)/vlm-dagster demo $(if $(EVENTS),--events '$(EVENTS)') $(if $(FORMAT),--format '$(FORMAT)') $(ARGS)

ui: $(READY) ## The Dagster UI on what the demo made, at http://localhost:3000
	@$(BIN)/vlm-dagster ui --port $(PORT)

test: $(READY) ## Run the tests (at most 10 minutes on 2 cores)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

check: $(READY) ## Format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY) ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY) ## Measure sealing, and a little of loading, on this machine
	@$(BIN)/python -m benchmarks.run $(ARGS)

bench-history: $(READY) ## Measure the history store: layout, compaction, newest events
	@$(BIN)/python -m benchmarks.history $(ARGS)

bench-loader: $(READY) ## Measure the loader against fat rows, other loaders and the floor
	@$(BIN)/python -m benchmarks.loader $(ARGS)

clean: ## Remove what the demo made; .venv stays
	rm -rf $(VLM_HOME)
