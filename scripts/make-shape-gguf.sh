#!/bin/sh
# Makes what `make bench-types` measures, in the cache folder, once: a model of a shape in benches/shapes (Qwen3-0.6B's
# if none is named) with made-up weights, in a GGUF file a type. They take 3.1 GB, and 1.2 GB more while they are made.
# Prints their folder as its last line.
set -eu

scripts=$(dirname "$0")
shape=${1:-$scripts/../benches/shapes/qwen3-0.6b}
types="Q4_0 Q4_K_M Q6_K Q8_0 BF16"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
target=$cache/$(basename "$shape")-made-up

# Files of another making are made again.
made_by=$(cat "$0" "$scripts/../benches/peers/made_up_gguf.py" "$shape/config.json" | cksum)
if [ "$(cat "$target/made-by" 2>/dev/null)" != "$made_by" ]; then
    "$scripts/fetch-test-assets.sh" >&2
    llama=$("$scripts/fetch-llama-cpp.sh")
    echo "shape: making $target, once, in a few minutes" >&2
    work=$(mktemp -d "$cache/shape.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' HUP INT TERM
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 >&2
    "$work/venv/bin/python" "$scripts/../benches/peers/made_up_gguf.py" "$shape" "$cache/qwen3-tokenizer" \
        "$work/f16.gguf" >&2
    rm -rf "$target"
    mkdir "$work/types"
    for type in $types; do
        echo "shape: quantising to $type" >&2
        "$llama/llama-quantize" "$work/f16.gguf" "$work/types/$type.gguf" "$type" >"$work/log" 2>&1 ||
            { cat "$work/log" >&2; exit 1; }
    done
    echo "$made_by" >"$work/types/made-by"
    mv "$work/types" "$target"
fi
echo "$target"
