#!/bin/sh
# Runs what `make gpu-check` builds on this machine: the code for real CUDA devices, on a stand-in for libcuda that runs
# the kernels as the tests' emulation does. What no GPU has run yet has made the right calls at least.
set -eu
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
scripts/build-libcuda.sh "$work"
OUT="$work" LD_LIBRARY_PATH="$work" target/cuda/gpu-check/run tiny
