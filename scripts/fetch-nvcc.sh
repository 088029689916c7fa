#!/bin/sh
# Installs NVIDIA's compiler for the kernels (and cuobjdump, which shows what it made of them) from PyPI into the cache
# folder, once: 300 MB. Prints the folder to use as CUDA_HOME as its last line. Needs no GPU and no driver.
set -eu

version=13.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
target=$cache/nvcc-$version

if [ ! -x "$target/cu13/bin/nvcc" ]; then
    echo "nvcc: installing $version into $target, once" >&2
    mkdir -p "$cache"
    rm -rf "$target.new"
    trap 'rm -rf "$target.new"' EXIT
    trap 'exit 130' INT TERM
    python3 -m venv "$target.new/venv"
    "$target.new/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nvidia-cuda-nvcc==13.0.88 \
        nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
        nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86 >&2
    mv "$target.new"/venv/lib/python3*/site-packages/nvidia/cu13 "$target.new/cu13"
    rm -rf "$target.new/venv"
    mv "$target.new" "$target"
fi
echo "$target/cu13"
