# Two commands for a start: `make run` and `make test`. Each sets up what it needs; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
# not given: as the environment was made; at first python3, 13, auto
PYTHON ?=
CUDA ?=
HOROVOD_BUILD ?=
RANKS ?= 4
RECIPE ?= digits
ARGS ?=
FAULTS ?= 60
MODELS ?= 300
SEED ?= 0

activate := . "$(VENV)/bin/activate"
linters := ruff check . && ruff format --check . && mypy && lint-imports && codespell
# ranks may outnumber cores, and in a container one is root: Open MPI wants to be told
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe := 1
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: help setup run test test-gpu test-slurm test-image test-bundle test-mpi bench soak fuzz pages lint doctor image bundle clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "settings: VENV=$(VENV) PYTHON=python3 CUDA=13|12 HOROVOD_BUILD=auto|cpu|nccl RANKS=$(RANKS) RECIPE=$(RECIPE) ARGS=..."

setup:  ## make the environment: torch, torchvision, DALI, MPI, Horovod, swap_hpc
	@VENV="$(VENV)" PYTHON="$(PYTHON)" CUDA="$(CUDA)" HOROVOD_BUILD="$(HOROVOD_BUILD)" swap_hpc/install/setup.sh

run: setup  ## train the recipe digits on 4 ranks (RECIPE=, RANKS=, ARGS="--set ...")
	@$(activate) && mpirun -n $(RANKS) swap-hpc train $(RECIPE) $(ARGS)

test: setup  ## lint, and every test at 1 to 4 ranks (8 in one)
	@$(activate) && $(linters) && python -m pytest $(ARGS)

test-gpu: setup  ## what needs a GPU, on a host with one (2 minutes); make test hides it
	@$(activate) && python -m pytest tests/gpu $(ARGS)

test-slurm: setup  ## the batch scripts on a Slurm cluster of two nodes, which the tests start themselves (root; 15 minutes)
	@$(activate) && python -m pytest tests/cluster $(ARGS)

test-image: setup  ## build the CPU image, and train inside it (root, buildah, debootstrap; 10 minutes)
	@$(activate) && python -m pytest -s tests/image $(ARGS)

test-bundle: setup  ## make a bundle, install it and train in a network namespace with no way out (root; 5 minutes)
	@$(activate) && python -m pytest tests/bundle $(ARGS)

test-mpi: setup  ## on the MPI that make setup took: two ranks' tests, signals and exit codes, a chain of faults, srun (root; 5 minutes)
	@$(activate) && python -m pytest -m mpi tests/parallel tests/commands tests/cluster $(ARGS)

bench: setup  ## what each part costs beside what one would use instead, and which bars are missed (20 minutes, an idle machine)
	@$(activate) && swap-hpc bench all $(ARGS)

soak: setup  ## kill, stop, break and hang runs at every place, 15 minutes (FAULTS=60, 175 are all; SEED=0)
	@$(activate) && python tests/soak.py --faults $(FAULTS) --seed $(SEED)

fuzz: setup  ## models of every kind, mixed at random, trained right or refused, 5 minutes (MODELS=300, SEED=0; ARGS="--only NAME")
	@$(activate) && python tests/fuzz.py --models $(MODELS) --seed $(SEED) $(ARGS)

pages: setup  ## write what pages take from the code: the recipes' fields, the API, the drawing of the grid
	@$(activate) && swap-hpc recipes --page >swap_hpc/recipe/README.md.new && mv swap_hpc/recipe/README.md.new swap_hpc/recipe/README.md
	@$(activate) && python tests/pages/api.py && python tests/pages/grid.py

lint: setup  ## ruff, mypy and codespell
	@$(activate) && $(linters)

image:  ## build the container image with docker, podman or buildah (IMAGE=swap_hpc BASE= RUNTIME= HOROVOD_BUILD=)
	@docker/image.sh $(ARGS)

bundle: setup  ## all that a cluster without a network needs, in one folder under dist/ (PYTHON=, CUDA=: of the environment)
	@$(activate) && swap_hpc/install/bundle.sh $(FOLDER)

doctor: setup  ## what a person asks first when a job fails
	@$(activate) && mpirun -n $(RANKS) swap-hpc doctor

clean:  ## remove the environment and what tools left
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
