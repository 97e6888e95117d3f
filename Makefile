# make demo   installs, draws synthetic roads, trains, predicts: images in demo/
# make test   installs, lints, tests
# make kernel builds the Kaggle notebook in build/; make push pushes it and runs it there (needs a Kaggle token)
# make pull KERNEL=owner/slug   brings back what was changed on the site, after a question
# make rehearse DATA=FOLDER   runs the notebook as a code competition reruns it on hidden images
# make kaggle-test  runs the notebook with Python 3.12 and the versions of Kaggle's image
# make lowest       runs the kit's tests with Python 3.10 and the lowest versions in requirements.txt
# make faults       kills, starves and damages over and over (20 to 30 minutes)
PYTHON ?= python3
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
PYTHON310 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10*/bin/python3.10) python3.10)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

unexport PYTHONDONTWRITEBYTECODE  # with it each process compiles the kit again

.PHONY: demo test kernel push pull rehearse kaggle-test lowest faults format clean

demo: .venv/kit
	$(PY) tools/demo.py

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 3 --dist worksteal --durations 5

kernel: .venv/push
	$(PY) tools/kernel.py build

push: .venv/push
	$(PY) tools/kernel.py push

pull: .venv/push
	@test -n "$(KERNEL)" || { echo "error: name the notebook: make pull KERNEL=owner/slug" >&2; exit 2; }
	$(PY) tools/kernel.py pull $(KERNEL)

rehearse: .venv/dev
	@test -n "$(DATA)" || { echo "error: name the competition's folder: make rehearse DATA=FOLDER" >&2; exit 2; }
	$(PY) tools/kernel.py rehearse --data $(DATA) $(FLAGS)

kaggle-test: .venv-kaggle/kit
	.venv-kaggle/bin/python -m pip install --quiet --no-deps --no-index \
		--find-links .venv-kaggle/wheels segmentation-models-pytorch
	KAGGLE_IMAGE=1 .venv-kaggle/bin/python -m pytest tests/test_kernel.py tests/test_kaggle.py --durations 5

lowest: .venv-lowest/dev
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal --durations 5 \
		--ignore tests/test_kernel.py --ignore tests/test_rehearsal.py

faults: .venv/dev
	FAULTS=100 $(PY) -m pytest -s tests/test_faults.py

format: .venv/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .venv-* build demo .pytest_cache .ruff_cache
	rm -rf __pycache__ tests/__pycache__ tools/__pycache__ kit/__pycache__ kit/*/__pycache__

.venv/kit: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (a few minutes, several GB with torch's GPU parts) ..."
	$(PIP) -r requirements.txt
	@touch $@

.venv/push: requirements-push.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -r requirements-push.txt
	@touch $@

.venv-kaggle/kit: requirements-kaggle.txt requirements-push.txt
	@test -x .venv-kaggle/bin/python || $(PYTHON312) -m venv .venv-kaggle
	@echo "installing what Kaggle's image has into .venv-kaggle (a few minutes) ..."
	.venv-kaggle/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-kaggle.txt \
		-r requirements-push.txt pytest pytest-xdist nbclient ipykernel
	.venv-kaggle/bin/python -m pip download --quiet --no-deps --dest .venv-kaggle/wheels segmentation-models-pytorch
	@touch $@

.venv-lowest/dev: requirements.txt
	@test -x .venv-lowest/bin/python || $(PYTHON310) -m venv .venv-lowest
	sed -E 's/>=([0-9.]+)[^ ]*/==\1/' requirements.txt > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/requirements.txt \
		pytest pytest-xdist hypothesis
	@touch $@

.venv/dev: requirements-dev.txt requirements-push.txt .venv/kit
	$(PIP) -r requirements-dev.txt
	@touch $@
