# What a newcomer needs: Python 3.10-3.13 and make. `make demo PYTHON=python3.12` picks another Python.
PYTHON ?= python3
BIN := .venv/bin
# Many tests wait for processes, servers and deadlines: two at a time take half as long. A worker that ends takes over what others have left.
TESTS := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo ui test long check race bench chaos clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: .venv/.installed ## install, then decide 1 000 real loan applications (DAY=2026-01-02 FILE=data/day_with_errors.csv for others, FRESH=1 to ask anew)
	@$(BIN)/python -m tools.demo $(if $(DAY),--day $(DAY)) $(if $(FILE),--file $(FILE)) $(if $(FRESH),--fresh)

ui: .venv/.installed ## Dagster's UI with the demo's history, until Ctrl-C (make ui PORT=3001 for another port)
	@exec $(BIN)/python -m tools.ui $(if $(PORT),--port $(PORT))

test: .venv/.installed-dev ## the tests, on all cores
	@$(TESTS) $(ARGS)

long: .venv/.installed-dev ## the exhaustive tests: processes killed at every point, every seed (an hour and more)
	@$(BIN)/python -m pytest -m long --timeout 3600 $(ARGS)

check: .venv/.installed-dev ## lint, types, import rules and tests: what .ci/run runs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(TESTS) $(ARGS)

race: .venv/.installed ## the cached-score race: about 20 % wrong risk ratings with a shared cache, none with pinned versions
	@$(BIN)/python examples/race.py $(ARGS)

bench: .venv/.installed ## what a boundary costs: five agents at 1 to 1 000 000 records against plain Parquet
	@$(BIN)/python benchmarks/boundary.py $(ARGS)

chaos: .venv/.installed ## kill steps, runs, compensators and ticks of 300 workflows, then ask the banks (ARGS="--workflows 30" for fewer)
	@$(BIN)/python -m tools.chaos $(ARGS)

clean: ## remove the demo's state and history (the installation stays)
	rm -rf .mao

.venv/.installed: pyproject.toml
	@$(PYTHON) tools/install.py

.venv/.installed-dev: pyproject.toml
	@$(PYTHON) tools/install.py dev
