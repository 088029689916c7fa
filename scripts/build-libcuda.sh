#!/bin/sh
# Compiles the stand-in for libcuda, which takes a minute, if it is not there or older than what it is made of, and
# prints the folder that it is in.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/target/libcuda
library=$folder/libcuda.so
if [ ! -e "$library" ] ||
    [ -n "$(find scripts/build-libcuda.sh kernels/cuda kernels/emulated/simt -type f -newer "$library")" ]; then
    mkdir -p "$folder"
    echo "compiling the stand-in for libcuda" >&2
    c++ -std=c++20 -O2 -fPIC -shared -fno-strict-aliasing -ffp-contract=off -Wno-unknown-pragmas -Wno-psabi \
        kernels/emulated/simt/libcuda.cpp -o "$library.new"
    mv "$library.new" "$library"
fi
echo "$folder"
