#!/bin/sh
# Compiles the stand-in for libcuda into the folder given.
set -eu
cd "$(dirname "$0")/.."
c++ -std=c++20 -O2 -fPIC -shared -fno-strict-aliasing -ffp-contract=off -Wno-unknown-pragmas -Wno-psabi \
    kernels/emulated/simt/libcuda.cpp -o "$1/libcuda.so"
