# Every target sets up what it needs: a fresh clone and `make quickstart` or `make test` is all there is to do.
# Python for the virtual environment:  make test PYTHON=python3.12
# Where pip finds a CPU build of torch:  make test TORCH_INDEX=<the CPU wheel index that pytorch.org's install page names>
#   (left empty, pip's own settings decide; the version is the one in constraints.txt)

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
BIN := .venv/bin
PINS := pyproject.toml constraints.txt scripts/setup.sh
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
export PYTHON TORCH_INDEX

.PHONY: quickstart test check slow bench format lines clean help

help:
	@echo "make quickstart   train a small V3, teach it to reason, write the report: about 15 minutes on two cores"
	@echo "make test         the default tests"
	@echo "make check        ruff, mypy --strict, house rules, line counts"
	@echo "make slow         the tests that take minutes (kill -9 and resume, learning curves)"
	@echo "make bench        the benchmarks against other libraries, one JSON line each"
	@echo "make clean        remove caches and the virtual environment; runs/ stays"

quickstart: .venv/.ready-run
	$(BIN)/sputnik quickstart

test: .venv/.ready-dev
	@scripts/browser.sh
	@scripts/sandbox.sh
	@scripts/postgres.sh
	@start=$$(date +%s); status=0; $(PYTEST) -n $(WORKERS) --dist loadscope || status=$$?; \
	echo "make test: $$(( $$(date +%s) - start )) seconds"; exit $$status

slow: .venv/.ready-dev
	@scripts/sandbox.sh
	@scripts/postgres.sh
	$(PYTEST) -m slow --timeout 1800

check: .venv/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -q tests/test_house.py tests/test_readme.py
	@$(BIN)/python scripts/lines.py

bench: .venv/.ready-bench
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

format: .venv/.ready-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lines: .venv/.ready-dev
	@$(BIN)/python scripts/lines.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find sputnik tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready-run: $(PINS)
	@scripts/setup.sh run

.venv/.ready-dev: $(PINS)
	@scripts/setup.sh dev

.venv/.ready-bench: $(PINS)
	@scripts/setup.sh bench
