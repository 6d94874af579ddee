PYTHON ?= python3
BIN = .venv/bin
WORKERS ?= 2

.PHONY: demo test test-slow faults lint types wheel-test clean venv .venv

# Rebuilt when what it is made from changes, or when its interpreter doesn't run.
venv .venv:
	@$(BIN)/python -c '' 2>/dev/null || rm -rf .venv
	@$(MAKE) --no-print-directory .venv/.stamp

.venv/.stamp: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/python -m sdpo_lightning demo

# A file's tests stay together: many share what one start of several processes has left.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n $(WORKERS) --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m slow

# Every failpoint, and random kills: minutes.
faults: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n $(WORKERS) --dist worksteal

lint: venv
	$(BIN)/ruff check .

# The public API under mypy, as another project sees it, and the package itself.
types: venv
	$(BIN)/mypy

# Builds wheel and sdist, and tries the wheel in an environment of its own.
wheel-test: venv
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

clean:
	rm -rf .venv runs build dist *.egg-info
