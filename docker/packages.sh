#!/usr/bin/env bash
# The system's packages of an image (Debian or Ubuntu): packages.sh build|run [further packages]
set -euo pipefail
case $1 in
  build) packages=(g++ make python3-dev python3-venv) ;;
  # ssh: mpirun on several hosts, and Open MPI wants to find one in any case. verbs: NCCL's way to InfiniBand.
  run) packages=(python3 openssh-client libibverbs1 ibverbs-providers) ;;
  *) echo "packages.sh build|run [further packages]" >&2; exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends ca-certificates "${packages[@]}" "${@:2}"
rm -rf /var/lib/apt/lists/*
