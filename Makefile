# The checks, from the shortest to the whole; PYTHON is the environment that `pip install -e '.[dev]'` was run in.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: help fast test all lint unit

help:
	@echo 'make fast   ruff and the tests of single modules: less than a minute'
	@echo 'make test   the default tests: less than six minutes on two cores'
	@echo 'make all    the whole check from a clean clone: less than 45 minutes on two cores'

fast: lint unit

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

unit:
	$(PYTHON) -m pytest -n 2 tests/unit -m 'not heavy and not slow and not slurm and not mpi and not browser'

test:
	$(PYTHON) -m pytest

all:
	bash .ci/run
