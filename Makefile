# Every target that needs the environment makes it first: on a fresh clone `make run` and `make test` each work at once.
# Variables: PYTHON (interpreter the environment is made from), METHOD and ARGS (for run), WORKERS (for the notebook tests),
# PINS (versions to install: constraints.txt is what the release was tested with, oldest.txt the oldest that settings.ini allows).
PYTHON  ?= python3
PINS    ?=
METHOD  ?= mint
ARGS    ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)

BIN   := .venv/bin
STAMP := .venv/.installed
PY    := $(BIN)/python
PAPERMILL := $(PY) -m papermill --no-progress-bar --log-level WARNING nbs/experiments.ipynb
# ipykernel says at every start that its connection to the local kernel is not encrypted
QUIET := 2> >(sed '/Kernel is running over TCP/d' >&2)

SHELL := bash

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install run test export-clean notebooks job pytest readme docs lab clean

help:
	@echo 'make run      one experiment (METHOD=mint on the digits), its record and its page; more settings: ARGS="-p sparsity 0.8"'
	@echo 'make test     what CI runs: export and clean leave no diff, notebook tests, the main job, pytest'
	@echo 'make readme   README.md from nbs/index.ipynb'
	@echo 'make docs     the site, into _docs (needs the quarto program)'
	@echo 'make lab      JupyterLab on the notebooks'
	@echo 'make clean    remove what the tools made; .venv and runs stay'

# The stamp is written last, so an interrupted install is taken up again by the next call.
install: $(STAMP)
$(STAMP): settings.ini setup.py $(PINS)
	@rm -f $@
	@$(PY) -c 'import pip' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "neuronprune needs Python 3.10 or newer, for instance: make PYTHON=python3.12 $(MAKECMDGOALS)")' \
	  && $(PYTHON) -m venv .venv; }
	@echo 'Installing into .venv (a few minutes the first time)'
	@$(PY) -m pip install -qq -e '.[dev]' $(if $(PINS),-c $(PINS))
	@touch $@

oldest.txt: settings.ini scripts/pins.py
	@$(PYTHON) scripts/pins.py oldest > $@

run: $(STAMP)
	@mkdir -p runs
	@$(PAPERMILL) runs/$(METHOD).ipynb -p method $(METHOD) $(ARGS) $(QUIET)
	@$(PY) -m jupyter nbconvert --log-level WARN --to html --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags hide runs/$(METHOD).ipynb
	@$(PY) scripts/show_record.py runs/$(METHOD).ipynb
	@echo 'Page: runs/$(METHOD).html'

# pytest comes last, so that its summary ends the output.
test: export-clean notebooks job pytest

export-clean: $(STAMP)
	@echo '== export and clean leave no diff'
	@$(PY) scripts/check_clean.py 'neuronprune/**/*.py' pyproject.toml -- $(BIN)/nbdev_export
	@$(PY) scripts/check_clean.py 'nbs/**/*.ipynb' -- $(BIN)/nbdev_clean

notebooks: $(STAMP)
	@echo '== notebooks'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS)

job: $(STAMP)
	@echo '== the main job, as in the README'
	@rm -rf runs/check && mkdir -p runs/check
	@$(PAPERMILL) runs/check/mint.ipynb -p method mint -p out runs/check $(QUIET)
	@$(PY) scripts/show_record.py runs/check/mint.ipynb

pytest: $(STAMP)
	@echo '== pytest'
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

readme: $(STAMP)
	@$(PY) scripts/readme.py

# README.md is touched so that nbdev_docs, which goes by file times, does not make one of its own.
docs: readme
	@command -v quarto >/dev/null || { echo 'make docs needs the quarto program: https://quarto.org/docs/get-started' >&2; exit 1; }
	@touch README.md
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs
	@rm -f nbs/sidebar.yml
	@test -f _docs/index.html || { echo 'no _docs/index.html was made' >&2; exit 1; }
	@echo 'Site: _docs/index.html'

lab: $(STAMP)
	@$(PY) -m jupyter lab nbs

clean:
	@rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis runs/check nbs/sidebar.yml
	@find neuronprune nbs tests scripts -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
