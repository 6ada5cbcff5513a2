#!/usr/bin/env bash
# Print the path of a Horovod wheel for the active environment; build it if the cache has none.
#
# horovod_source.py edits Horovod 0.28.1 (2023) so that it builds with current versions of torch and of compilers.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
build=${HOROVOD_BUILD:-auto}
log=${SWAP_HPC_LOG:-$SWAP_HPC_CACHE/horovod.log}

# --- dependencies of the wheel -------------------------------------------------------------------------------------
read -r tag torch cuda < <(python -c 'import sys, torch
print(sys.implementation.cache_tag, torch.__version__.split("+")[0], (torch.version.cuda or "none").split(".")[0])')
mpicc=$(command -v mpicc) || fail "no mpicc on the PATH: Horovod needs an MPI to be built for; load the module of one"
mpi=$(mpi_identity "$mpicc") || fail "$mpicc finds no mpi.h: load the compiler and the modules that belong to this MPI"
cuda_home=
if [ "$cuda" != none ]; then cuda_home=$(cuda_toolkit "$cuda"); fi
kind=$(horovod_kind "$build" "$cuda_home")
if [ "$kind" = nccl ] && [ -z "$cuda_home" ]; then
  fail "HOROVOD_BUILD=nccl needs the CUDA $cuda toolkit (nvcc): load its module, or set CUDA_HOME; HOROVOD_BUILD=cpu needs none"
fi
horovod_without_nccl "$build" "$kind" "$cuda" "$cuda_home" >&2
depends=$(horovod_depends "$tag" "$torch" "$cuda" "$mpi" "$kind")
if kept_horovod "$depends"; then exit 0; fi

# --- building ------------------------------------------------------------------------------------------------------
. "$here/preflight.sh"
problems=$(header_problems python; compiler_problems; mpi_problems "$mpicc")
if [ -n "$problems" ]; then echo "$problems" >&2; exit 1; fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$SWAP_HPC_CACHE"

with="$mpi$([ "$kind" = cpu ] || echo ", NCCL and the toolkit $cuda_home")"
echo "        building Horovod with $with: 1 to 8 minutes, once (log: $log)" >&2

# The source is kept, so that a second build needs no network.
source=$SWAP_HPC_CACHE/horovod-$HOROVOD_VERSION.tar.gz
published=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
sound() { sha256sum --check --status <<<"$published  $1" 2>/dev/null; }
: >"$log"
if ! sound "$source"; then
  python -m pip download --no-deps --no-binary :all: --no-build-isolation -d "$work" "horovod==$HOROVOD_VERSION" >>"$log" 2>&1 \
    || fail "Horovod's source could not be fetched; log: $log"
  sound "$work/horovod-$HOROVOD_VERSION.tar.gz" \
    || fail "Horovod's source differs from the published one: check the index that pip uses"
  aside=$(mktemp "$SWAP_HPC_CACHE/tmp.XXXXXX")
  cp "$work/horovod-$HOROVOD_VERSION.tar.gz" "$aside"
  mv "$aside" "$source"
fi
tar xzf "$source" -C "$work"
cd "$work/horovod-$HOROVOD_VERSION"
python "$here/horovod_source.py" . || exit 1

# Ignore all settings of Horovod, MPI and oneCCL that come from the user or from a site's modules.
architectures=$(gpu_architectures "$cuda")
kept=$(horovod_folder "$depends")
for name in $(compgen -e HOROVOD_) CCL_ROOT MPI_HOME; do unset "$name"; done
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_NVTX=1
MPI_HOME=$(dirname "$(dirname "$mpicc")"); export MPI_HOME
if [ "$kind" = nccl ]; then
  nccl=$(python -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])')
  mkdir -p "$work/nccl"
  ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
  export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$work/nccl
  export HOROVOD_BUILD_CUDA_CC_LIST=$architectures CUDA_HOME=$cuda_home HOROVOD_CUDA_HOME=$cuda_home PATH=$cuda_home/bin:$PATH
fi
# nproc would print OMP_NUM_THREADS instead of the number of cores.
export CXX=${CXX:-g++}
jobs=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
if ! MAKEFLAGS="-j$jobs" python -m pip wheel --no-deps --no-build-isolation -w "$work/wheel" . >>"$log" 2>&1; then
  # The compiler's first error; the pattern leaves out pip's own "error: ...".
  grep -m 1 -E ': (fatal )?error: |CMake Error|: undefined reference' "$log" | cut -c 1-300 >&2 || true
  # shellcheck disable=SC2086  # CXX may hold options
  fail "Horovod could not be built with $($CXX --version | head -n 1); the first error is above, the log in $log"
fi

# Copy aside, then rename, so that no other set-up finds half a wheel.
aside=$(mktemp -d "$SWAP_HPC_CACHE/tmp.XXXXXX")
cp "$work"/wheel/*.whl "$aside"; echo "$depends" >"$aside/depends.txt"
rm -rf "$kept"; mv "$aside" "$kept"
echo "$kept"/*.whl
