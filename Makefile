# Everything goes through .venv, which the first command that needs it creates.
#   make train       set everything up and train on handwritten digits (+exp=digits)
#   make data-demo IMAGES=FOLDER   the same for your own pictures: shards, a check of them, training
#   make test        set everything up and run all tests;  make test-fast  the quick part
#   make fuzz SECONDS=600   attacks and faults by chance, counted; SEED=… makes the same ones again
#   make chaos FAULTS=20    faults by chance on a run on three hosts, which are namespaces (root)
#   make check       linters, types, import contracts;     make format     apply ruff's format
#   make house       how the source is built, counted; AGAINST=REV compares with that revision
#   make bench       the benchmarks that run on a CPU, their JSON files under $LAPFLOW_HOME/bench
#   make bench-gpu   the tests and benchmarks that need a GPU, in 25 minutes, into one JSON file
#   make pictures    draw the pictures of the documentation anew
#   make settings    write docs/settings.md anew from the configuration dataclasses
#   make ui          open the MLflow pages of the runs on this machine
#   make doctor      look at the installation: versions, what is wrong, what to do
#   make audit       licences, versions and files of what is installed
#   make clean-venv  remove .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
EXP ?= digits
IMAGES ?=
INGEST ?=
ARGS ?=
LAPFLOW_HOME ?= $(HOME)/lapflow

export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= 1
# Threads of several processes that wait for each other by spinning cost more than they bring.
export OMP_NUM_THREADS ?= 1

.PHONY: train data-demo test test-fast check format house fuzz chaos bench bench-gpu pictures settings ui setup clean-venv golden doctor audit

train: setup
	$(BIN)/python -m trainer.launch +exp=$(EXP) $(ARGS)

PICTURES ?= $(LAPFLOW_HOME)/store/datasets/pictures
# Not every shell reads a ~ behind the = of an argument.
FOLDER = $(patsubst ~/%,$(HOME)/%,$(IMAGES))
SHARDS = $(patsubst ~/%,$(HOME)/%,$(PICTURES))
data-demo: setup
	@test -d "$(FOLDER)" || { echo "error: IMAGES=$(IMAGES) is no folder: make data-demo IMAGES=~/pictures" >&2; exit 2; }
	$(BIN)/python -m pipelines.ingest image-folder "$(FOLDER)" "$(SHARDS)" --image-size 64 --encoding png --hold-out 0.1 $(INGEST)
	$(BIN)/python -m pipelines.ingest verify "$(SHARDS)/train"
	$(BIN)/python -m trainer.launch +exp=pictures "data.prefix=$(SHARDS)" $(ARGS)

# Compiled once, whatever is set: each process of pytest, and each that a test starts, would compile everything anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
# A process that crashes ends the tests: replaced, it may leave the others waiting for its files. Four at a time keep two
# cores busy, for much is waited for: a store that is away, a node that does not answer. Whole jobs, which take longest,
# come first, so that none is left over at the end.
JOBS := tests/chaos tests/integration
REST := $(filter-out $(JOBS) %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))
test: test-fast
	$(PYTEST) -m slow -n 4 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 $(JOBS) $(REST) $(ARGS)

test-fast: setup
	$(PYTEST) -m "not slow" -n auto --dist loadfile $(ARGS)

SECONDS ?= 120
SEED ?=
fuzz: setup
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

FAULTS ?= 20
chaos: setup
	$(BIN)/python -m tests.chaos --faults $(FAULTS) $(if $(SEED),--seed $(SEED)) --picture "$(LAPFLOW_HOME)/chaos.png" $(ARGS)

AGAINST ?=
house: setup
	$(BIN)/python -m tests.house $(if $(AGAINST),--against $(AGAINST)) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

settings: setup
	$(BIN)/python -m docs.settings_page

golden: setup
	$(BIN)/python -m tests.golden.render
	$(BIN)/python -m tests.golden.losses.record

bench: setup
	mkdir -p "$(LAPFLOW_HOME)/bench"
	$(BIN)/python -m benchmarks.training_loop --output "$(LAPFLOW_HOME)/bench/training_loop.json"
	$(BIN)/python -m benchmarks.training_step --output "$(LAPFLOW_HOME)/bench/training_step.json"
	$(BIN)/python -m benchmarks.prefix_attention --output "$(LAPFLOW_HOME)/bench/prefix_attention.json"
	$(BIN)/python -m benchmarks.expert_matmul --output "$(LAPFLOW_HOME)/bench/expert_matmul.json"
	$(BIN)/python -m benchmarks.sampling --output "$(LAPFLOW_HOME)/bench/sampling.json"
	for name in decoding streaming starting waiting; do \
	    $(BIN)/python -m benchmarks.data $$name --output "$(LAPFLOW_HOME)/bench/data_$$name.json" || exit 1; done
	for name in memory wire step full_size building; do \
	    $(BIN)/python -m benchmarks.experts $$name --output "$(LAPFLOW_HOME)/bench/experts_$$name.json" || exit 1; done
	for name in blocked transfer memory; do \
	    $(BIN)/python -m benchmarks.checkpoints $$name --output "$(LAPFLOW_HOME)/bench/checkpoints_$$name.json" || exit 1; done

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu --output "$(LAPFLOW_HOME)/bench/gpu.json" $(ARGS)

pictures: setup
	$(BIN)/python docs/pictures.py $(ARGS)
	$(BIN)/python docs/placement_picture.py
	$(BIN)/python -m docs.rooms_picture

ui: setup
	$(BIN)/python -m trainer.ui "home=$(LAPFLOW_HOME)" $(ARGS)

audit: setup
	$(BIN)/python install/audit.py

doctor: setup
	$(BIN)/python -m trainer.doctor

setup: $(READY)

$(READY): pyproject.toml constraints.txt install.sh
	./install.sh $(PYTHON) $(VENV)
	touch $@

clean-venv:
	rm -rf $(VENV)
