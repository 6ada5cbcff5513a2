#!/usr/bin/env bash
# Checks for all that would make a set-up fail, to be run before anything is downloaded. Sourced after common.sh.
# Each function prints one line per problem, with a hint, or nothing.

problem() { echo "swap_hpc setup: $*"; }

# python_problems PYTHON: the modules that create a virtual environment.
python_problems() {
  "$1" -c 'import venv, ensurepip' 2>/dev/null \
    || problem "Python's module venv is missing: install it (Debian: apt-get install python3-venv)"
}

# header_problems PYTHON: its headers, with which mpi4py and Horovod are compiled.
header_problems() {
  local include
  include=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -e "$include/Python.h" ] \
    || problem "Python's headers are missing (no $include/Python.h): install them (Debian: apt-get install python3-dev)"
}

# compiler_problems: make, and a C++ compiler for torch's headers, to build Horovod.
compiler_problems() {
  local compiler=${CXX:-g++}
  if ! command -v "${compiler%% *}" >/dev/null; then
    problem "no C++ compiler ($compiler): install one (Debian: apt-get install g++), or load the site's module"
  else
    # shellcheck disable=SC2086  # CXX may hold options
    printf '%s\n' '#include <concepts>' '#include <ranges>' '#include <span>' 'static_assert(std::integral<int>); std::span<int> some;' \
      | $compiler -std=c++20 -x c++ -fsyntax-only - 2>/dev/null \
      || problem "$compiler ($($compiler --version 2>/dev/null | head -n 1)) cannot compile C++20, which torch's headers need:" \
                 "load or install gcc 11, clang 16 or a newer one, and name it with CXX="
  fi
  command -v make >/dev/null || problem "no make: install it (Debian: apt-get install make)"
}

# mpi_problems MPICC: the parts of a site's MPI with which mpi4py and Horovod are built.
mpi_problems() {
  local package="MPI's development package (Debian: apt-get install libopenmpi-dev, or libmpich-dev)"
  echo '#include <mpi.h>' | "$1" -fsyntax-only -x c - 2>/dev/null \
    || problem "$1 finds no mpi.h: install $package, or load the compiler that belongs to this MPI"
  [ -x "$(dirname "$1")/mpicxx" ] || problem "mpicxx is missing beside $1: install $package"
}

# toolkit_problems BUILD CUDA: the CUDA toolkit, for HOROVOD_BUILD=nccl.
toolkit_problems() {
  if [ "$1" = nccl ] && [ -z "$(cuda_toolkit "$2")" ]; then
    problem "HOROVOD_BUILD=nccl needs the CUDA $2 toolkit (nvcc): load its module, or set CUDA_HOME; HOROVOD_BUILD=cpu needs none"
  fi
}

# machine_problems: torch's wheels are for two machine types, and for glibc 2.28 (2018) or newer.
machine_problems() {
  local oldest=2.28
  case $(uname -m) in
    x86_64|aarch64) ;;
    *) problem "torch has no wheels for $(uname -m), only for x86_64 and aarch64" ;;
  esac
  no_older "$(glibc)" "$oldest" \
    || problem "torch's wheels need glibc $oldest or newer, but this system has $(glibc || true): use a container (make image)"
}

# disk_problems SETTING FOLDER GIB ...: the free space for folders, which need not exist yet. Folders on one file system add
# up; the present content of VENV counts as free; a file system that does not report its free space is not checked.
disk_problems() {
  local setting folder gib disk free
  local -A needed=() named=() room=()
  while [ $# -gt 0 ]; do
    setting=$1 folder=$2 gib=$3
    shift 3
    if [ -d "$folder" ] && [ "$setting" = VENV ]; then gib=$((gib - $(du -sk "$folder" | cut -f1) / 1024 / 1024)); fi
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    read -r free disk < <(df -Pk "$folder" 2>/dev/null | awk 'NR == 2 && $4 ~ /^[0-9]+$/ { print int($4 / 1024 / 1024), $6 }') || continue
    needed[$disk]=$((${needed[$disk]:-0} + gib)) room[$disk]=$free named[$disk]+="${named[$disk]:+ and }$setting="
  done
  for disk in "${!needed[@]}"; do
    if [ "${room[$disk]}" -lt "${needed[$disk]}" ]; then
      problem "$disk has ${room[$disk]} GiB free, but about ${needed[$disk]} are needed:" \
              "free some space, or choose another place (${named[$disk]})"
    fi
  done
}
