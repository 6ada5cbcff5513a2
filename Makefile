# `make run` and `make test` are the two commands to start with. Each sets up what it needs; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
# Empty: as the environment was made before; for a new one python3, 13 and auto.
PYTHON ?=
CUDA ?=
HOROVOD_BUILD ?=
RANKS ?= 4
RECIPE ?= digits
ARGS ?=
FAULTS ?= 60
MODELS ?= 300
SEED ?= 0
FIRST ?= 0
SLOW ?= 1
# Processes that run tests at the same time: tests wait for launchers and disks half of their time.
JOBS ?= 2
SITES ?= cluster image bundle

activate := . "$(VENV)/bin/activate"
linters := ruff check . && ruff format --check . && mypy && lint-imports && codespell
# Open MPI refuses more ranks than cores, and to run as root (as in containers), unless these are set.
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe := 1
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: help setup run test test-gpu test-slurm test-image test-bundle test-sites test-mpi bench soak fuzz pages lint doctor image bundle clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13
	@echo "settings: VENV=$(VENV) PYTHON=python3 CUDA=13|12 HOROVOD_BUILD=auto|cpu|nccl RANKS=$(RANKS) RECIPE=$(RECIPE) ARGS=..."

setup:  ## create the environment: torch, torchvision, DALI, MPI, Horovod, swap_hpc
	@VENV="$(VENV)" PYTHON="$(PYTHON)" CUDA="$(CUDA)" HOROVOD_BUILD="$(HOROVOD_BUILD)" swap_hpc/install/setup.sh

run: setup  ## train the recipe digits on 4 ranks (RECIPE=, RANKS=, ARGS="--set ...")
	@$(activate) && mpirun -n $(RANKS) swap-hpc train $(RECIPE) $(ARGS)

test: setup  ## lint, and run every test on 1 to 4 ranks (one on 8)
	@$(activate) && $(linters) && python -m pytest -n $(JOBS) --no-loadscope-reorder $(ARGS)

test-gpu: setup  ## run the tests that need a GPU, on a host with one (2 minutes); make test runs without GPUs
	@$(activate) && python -m pytest tests/gpu $(ARGS)

test-slurm: setup  ## test the batch scripts on a Slurm cluster of two nodes, which the tests start (root; 15 minutes)
	@$(activate) && python -m pytest tests/cluster $(ARGS)

test-image: setup  ## build the CPU image and train inside it (root, buildah, debootstrap; 10 minutes)
	@$(activate) && python -m pytest -s tests/image $(ARGS)

test-bundle: setup  ## make a bundle, install it and train without any network; Horovod's edited source (root; 8 minutes)
	@$(activate) && python -m pytest tests/bundle $(ARGS)

test-sites: setup  ## test-slurm, test-image and test-bundle, at the same time (root; 20 minutes)
	@$(activate) && python -m pytest -n 3 $(addprefix tests/,$(SITES)) $(ARGS)

test-mpi: setup  ## test the environment's MPI: two ranks, signals, exit codes, a chain of faults, srun (root; 5 minutes)
	@$(activate) && python -m pytest -m mpi -n $(JOBS) tests/parallel tests/commands tests/cluster $(ARGS)

bench: setup  ## measure each part beside its usual alternative, and list missed targets (20 minutes, on an idle machine)
	@$(activate) && swap-hpc bench all $(ARGS)

soak: setup  ## kill, stop, break and hang runs at every place (FAULTS=60 of 270; SEED=0 FIRST=0 SLOW=1)
	@$(activate) && SLOW=$(SLOW) python tests/soak.py --faults $(FAULTS) --seed $(SEED) --first $(FIRST)

fuzz: setup  ## train random mixtures of layers of every kind, 5 minutes (MODELS=300, SEED=0; ARGS="--only NAME")
	@$(activate) && python tests/fuzz.py --models $(MODELS) --seed $(SEED) $(ARGS)

pages: setup  ## write what pages take from the code: the fields of recipes and studies, the API, the drawing of the grid
	@$(activate) && swap-hpc recipes --page >swap_hpc/recipe/README.md.new && mv swap_hpc/recipe/README.md.new swap_hpc/recipe/README.md
	@$(activate) && swap-hpc study --page >swap_hpc/study/fields.md.new && mv swap_hpc/study/fields.md.new swap_hpc/study/fields.md
	@$(activate) && python tests/pages/api.py && python tests/pages/grid.py

lint: setup  ## run ruff, mypy, import-linter and codespell
	@$(activate) && $(linters)

image:  ## build the container image with docker, podman or buildah (IMAGE=swap_hpc BASE= RUNTIME= HOROVOD_BUILD=)
	@docker/image.sh $(ARGS)

bundle: setup  ## gather all that a cluster without a network needs in a folder under dist/ (PYTHON=, CUDA=)
	@$(activate) && swap_hpc/install/bundle.sh $(FOLDER)

doctor: setup  ## print versions, launcher, GPUs and problems: the first thing to look at when a job fails
	@$(activate) && mpirun -n $(RANKS) swap-hpc doctor

clean:  ## remove the environment and the caches of tools
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
