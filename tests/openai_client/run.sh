#!/bin/bash
# Runs the stock OpenAI Python client against the program that `cargo build` made. The client lives in an environment of
# its own under the cache folder; it is installed once.
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
model=${ENGINE_DEMO_MODEL:-$cache/SmolLM2-135M-Instruct.Q4_1.gguf}
engine=${ENGINE_BIN:-${CARGO_TARGET_DIR:-target}/debug/engine}
requirements=tests/openai_client/requirements.txt

[ -f "$model" ] || { echo "$model is missing; 'make demo-model' fetches it" >&2; exit 1; }
[ -x "$engine" ] || { echo "$engine is missing; 'cargo build' makes it" >&2; exit 1; }

venv=$cache/openai-client-$(cksum <"$requirements" | cut -d ' ' -f 1)
if [ ! -f "$venv/ready" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
    touch "$venv/ready"
fi
exec "$venv/bin/python" tests/openai_client/test_client.py "$engine" "$model"
