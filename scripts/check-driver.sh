#!/bin/sh
# Runs what `make gpu-check` builds on this machine: the code for real CUDA devices, on a stand-in for libcuda that runs
# the kernels as the tests' emulation does. What no GPU has run yet has made the right calls at least. The folder is
# carried first, to where there is no repository and no compiler, as it will be. PYTHON names a python3 with PyTorch, if
# there is one.
set -eu
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
standin=$(scripts/build-libcuda.sh)
cp -r target/cuda/gpu-check "$work/carried"
cd "$work"
env -i PATH=/usr/bin:/bin HOME="$work" OUT="$work" LD_LIBRARY_PATH="$standin" PYTHON="${PYTHON:-python3}" \
    carried/run tiny
