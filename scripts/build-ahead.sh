#!/bin/sh
# Compiles what takes minutes and no cargo, before a build or a test asks for it: the CUDA kernels and the stand-in for
# libcuda. `make test` has it done at the lowest priority beside tests, some of which mostly wait. The kernels' own
# build script does it (kernels/device/build.rs), which leaves them where it finds them when cargo runs it.
set -eu
cd "$(dirname "$0")/.."

CUDA_HOME=$(scripts/fetch-nvcc.sh | tail -1)
export CUDA_HOME
ahead=$PWD/target/debug/build/ahead
mkdir -p "$ahead/out"
rustc --edition 2024 kernels/device/build.rs -o "$ahead/build"
(cd kernels/device && CARGO_FEATURE_CUDA=1 OUT_DIR="$ahead/out" "$ahead/build" >/dev/null)
scripts/build-libcuda.sh >/dev/null
