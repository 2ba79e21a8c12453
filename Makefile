# make demo: train on the example pictures and see what it does.   make test: the tests.
# make screenshots: docs/screenshots anew.   make bench: what a step, a run and a picture cost.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: bench demo screenshots test test-slow torture check format

demo: .venv/installed
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
		--dynamo_backend no train_sd_lora.py --config configs/tiny.yaml
	$(BIN)/python -m tools.demo

screenshots: .venv/installed-dev
	$(BIN)/python -m tools.screenshots

# BENCH='--only step-tiny --json FILE' chooses parts; python -m tools.bench --help tells all.
bench: .venv/installed-dev
	$(BIN)/python -m tools.bench $(BENCH)

# Those that look at the clock by themselves, the others in two processes.
TIMED := tests/test_app_browser.py tests/test_families.py
test: .venv/installed-dev
	$(BIN)/python -m pytest $(TIMED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TIMED:%=--ignore %)

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

torture: .venv/installed-dev
	$(BIN)/python -m tests.torture.crash_points
	$(BIN)/python -m tests.torture.bit_equality
	$(BIN)/python -m tests.torture.kill_campaign --kills 200
	$(BIN)/python -m tests.torture.real_kills --kills 20
	$(BIN)/python -m tests.torture.save_cost
	$(BIN)/python -m pytest -m torture

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
