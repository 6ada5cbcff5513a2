#!/usr/bin/env bash
# Build the image with docker, podman or buildah, the first that is installed: `make image`,
# `make image BASE=debian:trixie ...`
#
#   IMAGE=swap_hpc TOOL=docker|podman|buildah BASE= RUNTIME= CUDA=13|12 HOROVOD_BUILD=nccl|cpu MPI_PACKAGES= \
#       RUN_PACKAGES= image.sh [options of the tool's build command]
#
# The tools have settings of their own, too: buildah works inside a container with BUILDAH_ISOLATION=chroot and
# STORAGE_DRIVER=vfs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=${TOOL:-}
for each in docker podman buildah; do
  if [ -z "$tool" ] && command -v "$each" >/dev/null; then tool=$each; fi
done
if [ -z "$tool" ] || ! command -v "$tool" >/dev/null; then
  echo "swap_hpc image: no ${tool:-docker, podman or buildah} on the PATH: install one (Debian: apt-get install buildah)" >&2
  exit 1
fi

arguments=()
for name in BASE RUNTIME CUDA HOROVOD_BUILD MPI_PACKAGES RUN_PACKAGES; do
  if [ -n "${!name:-}" ]; then arguments+=(--build-arg "$name=${!name}"); fi
done
if [ "$tool" = docker ]; then export DOCKER_BUILDKIT=1; else arguments+=(--format docker); fi
"$tool" build "${arguments[@]}" --file docker/Dockerfile --tag "${IMAGE:-swap_hpc}" "$@" .
