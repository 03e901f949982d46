# `make sweep` and `make test` set up .venv by themselves and can be run again.
PYTHON ?= python3
NAME ?= quickstart
BIN := .venv/bin

.PHONY: sweep test test-fast test-gpu lint ui services services-stop chaos audit clean

# A finished sweep is shown, an interrupted one continued, otherwise it starts. NAME=... starts another.
sweep: .venv/installed
	@if [ -f runs/sweeps/$(NAME)/sweep.yaml ]; then \
		$(BIN)/gsa sweep --resume $(NAME); \
	else \
		$(BIN)/gsa sweep configs/sweep/quickstart.yaml name=$(NAME); \
	fi

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=25

# what starts neither Ray nor a server and takes seconds: while you edit
test-fast: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not ray and not services and not gpu"

# the same kernels on a GPU; for checks of memory and races by NVIDIA's tools see tests/kernels/sanitize.py
test-gpu: .venv/installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu -n 4 --dist worksteal tests/kernels tests/gsa

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

ui: .venv/installed
	$(BIN)/gsa ui

# MLflow with passwords, on PostgreSQL and an S3 store, on localhost; everything of it is in runs/services
services: .venv/installed
	$(BIN)/python -m dashboards.services start

services-stop: .venv/installed
	$(BIN)/python -m dashboards.services stop

# ten minutes of a sweep that loses a node, a process or a server every half minute
chaos: .venv/installed
	$(BIN)/python -m tests.bench.chaos

# known holes in what is installed; asks PyPI
audit: .venv/installed
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:
	rm -rf .venv

# Installed when pyproject.toml or the constraints change; a .venv that was left half made is made anew.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/installed
