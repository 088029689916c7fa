#!/bin/sh
# Installs NIXL, the peer of the transfer benchmark, into the cache folder, once: 100 MB of Python packages. Prints the
# Python that has it as its last line.
set -eu

version=1.5.1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
target=$cache/nixl-$version

if [ ! -x "$target/bin/python" ]; then
    echo "nixl: installing $version into $target, once (make bench PEERS= does without)" >&2
    mkdir -p "$cache"
    rm -rf "$target.new"
    trap 'rm -rf "$target.new"' EXIT
    trap 'exit 130' INT TERM
    python3 -m venv "$target.new"
    # Without its dependencies: PyTorch is one of them, and it is not needed to move memory.
    "$target.new/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        "nixl_cu12==$version" "nixl==$version" numpy >&2
    # Of a virtual environment, only the scripts beside the interpreter know its path.
    mv "$target.new" "$target"
fi
echo "$target/bin/python"
