#!/usr/bin/env bash
# Install the system packages of an image (Debian or Ubuntu): packages.sh build|run [more packages]
set -euo pipefail
case $1 in
  build) packages=(g++ make python3-dev python3-venv) ;;
  # ssh: mpirun uses it for several hosts, and Open MPI looks for it even on one. verbs: NCCL reaches InfiniBand with it.
  run) packages=(python3 openssh-client libibverbs1 ibverbs-providers) ;;
  *) echo "usage: packages.sh build|run [more packages]" >&2; exit 2 ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends ca-certificates "${packages[@]}" "${@:2}"
rm -rf /var/lib/apt/lists/*
