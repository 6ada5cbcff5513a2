# Sourced by the other scripts.

SWAP_HPC_CACHE=${SWAP_HPC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/swap_hpc}

fail() { echo "swap_hpc setup: $*" >&2; exit 1; }

need_compiler() {
  local compiler=${CXX:-g++}
  command -v "${compiler%% *}" >/dev/null \
    || fail "no C++ compiler ($compiler): install one (Debian: apt-get install g++), or load the site's module"
}
