#!/usr/bin/env bash
# What would keep a set-up from ending well, found before anything is downloaded. Sourced after common.sh.
# Each function prints one line a problem, with a hint, or nothing.

problem() { echo "swap_hpc setup: $*"; }

# python_problems PYTHON
python_problems() {
  "$1" -c 'import venv, ensurepip' 2>/dev/null \
    || problem "Python's module venv is missing: install it (Debian: apt-get install python3-venv)"
}

# build_problems PYTHON [MPICC]: what mpi4py and Horovod are compiled with. MPICC: of a site's MPI.
build_problems() {
  local include package="MPI's development package (Debian: apt-get install libopenmpi-dev, or libmpich-dev)"
  include=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -e "$include/Python.h" ] \
    || problem "Python's headers are missing (no $include/Python.h): install them (Debian: apt-get install python3-dev)"
  compiler_problems
  command -v make >/dev/null || problem "no make: install it (Debian: apt-get install make)"
  if [ -n "${2:-}" ]; then
    mpi_version "$2" >/dev/null || problem "$2 finds no mpi.h: install $package, or load the compiler that belongs to this MPI"
    [ -x "$(dirname "$2")/mpicxx" ] || problem "mpicxx is missing beside $2: install $package"
  fi
}

# A C++ compiler that knows what torch's headers use.
compiler_problems() {
  local compiler=${CXX:-g++} program
  if ! command -v "${compiler%% *}" >/dev/null; then
    problem "no C++ compiler ($compiler): install one (Debian: apt-get install g++), or load the site's module"
    return
  fi
  program=$(mktemp)
  # shellcheck disable=SC2086  # CXX may hold options
  printf '#include <%s>\n' concepts ranges span | cat - <(echo 'int main() { return int(std::span<int>().size()); }') \
    | $compiler -std=c++20 -x c++ - -o "$program" 2>/dev/null \
    || problem "$compiler ($($compiler --version 2>/dev/null | head -n 1)) cannot compile C++20, which torch's headers want:" \
               "load or install gcc 11, clang 16 or a newer one, and name it with CXX="
  rm -f "$program"
}

# toolkit_problems BUILD CUDA
toolkit_problems() {
  if [ "$1" = nccl ] && [ -z "$(cuda_toolkit "$2")" ]; then
    problem "HOROVOD_BUILD=nccl needs the CUDA $2 toolkit (nvcc): load its module, or set CUDA_HOME; HOROVOD_BUILD=cpu does without"
  fi
}

# torch's wheels are for two machine types and a C library of 2018.
machine_problems() {
  local oldest=2.28
  case $(uname -m) in
    x86_64|aarch64) ;;
    *) problem "torch has no wheels for $(uname -m), only for x86_64 and aarch64" ;;
  esac
  no_older "$(glibc)" "$oldest" \
    || problem "torch's wheels want glibc $oldest or newer, this system has $(glibc || true): use a container (make image)"
}

# disk_problems SETTING FOLDER GIB ...: too little room for a folder, which need not exist yet. Folders of one file system add up.
disk_problems() {
  local setting folder gib disk free
  local -A needed=() named=() room=()
  while [ $# -gt 0 ]; do
    setting=$1 folder=$2 gib=$3
    shift 3
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    read -r free disk < <(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1024 / 1024), $6 }')
    needed[$disk]=$((${needed[$disk]:-0} + gib)) room[$disk]=$free named[$disk]+="${named[$disk]:+ and }$setting="
  done
  for disk in "${!needed[@]}"; do
    if [ "${room[$disk]}" -lt "${needed[$disk]}" ]; then
      problem "$disk has ${room[$disk]} GiB free, and about ${needed[$disk]} are needed there: make room, or name another place (${named[$disk]})"
    fi
  done
}
