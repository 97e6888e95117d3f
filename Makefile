# make demo   installs, draws synthetic roads, trains, predicts: pictures in demo/
# make test   installs, lints, tests
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test format clean

demo: .venv/kit
	$(PY) demo.py

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 2 --dist loadfile --durations 5

format: .venv/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.venv/kit: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (a few minutes, several GB with torch's GPU parts) ..."
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/kit
	$(PIP) -r requirements-dev.txt
	@touch $@
