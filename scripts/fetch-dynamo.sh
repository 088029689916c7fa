#!/bin/sh
# Installs Dynamo's frontend and mocker, the peers of the frontend benchmark, into the cache folder, once: 600 MB of
# Python packages. Prints the Python that has them as its last line.
set -eu

version=1.6.1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
target=$cache/dynamo-$version

if [ ! -x "$target/bin/python" ]; then
    echo "dynamo: installing $version into $target, once (make bench PEERS= does without)" >&2
    mkdir -p "$cache"
    rm -rf "$target.new"
    trap 'rm -rf "$target.new"' EXIT
    trap 'exit 130' INT TERM
    python3 -m venv "$target.new"
    pip() { "$target.new/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
    # Its dependencies by name, because one that it does not need here cannot be had everywhere.
    pip 'aiohttp>=3.14.3,<4' certifi 'kubernetes>=32.0.1,<33' msgspec 'prometheus-client>=0.23.1,<1' \
        'pydantic>=2.10.6,<=2.13.5' pyzmq 'redis>=6.2,<9' tqdm 'transformers>=4.56' typing-extensions uvloop \
        'zstandard>=0.23,<1'
    pip --no-deps "ai-dynamo==$version" "ai-dynamo-runtime==$version"
    # Of a virtual environment, only the scripts beside the interpreter know its path.
    mv "$target.new" "$target"
fi
echo "$target/bin/python"
