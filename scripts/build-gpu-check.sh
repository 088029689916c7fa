#!/bin/sh
# Makes target/cuda/gpu-check, a folder of programs that need nothing but a GPU and its driver: the kernels' tests and
# their benchmark, with the real driver's code in them, the engine, and `run`, which runs them all (scripts/gpu-check.sh).
# CUDA_HOME says where nvcc is; target/cuda/engine is there (`make cuda`).
set -eu
cd "$(dirname "$0")/.."

folder=target/cuda/gpu-check
tokenizer=${XDG_CACHE_HOME:-$HOME/.cache}/engine/qwen3-tokenizer
rm -rf target/cuda/gpu-check*
mkdir -p "$folder/tokenizer"
# As `cargo test --workspace` builds them: another selection means other features, and compiling everything again.
cargo test --workspace --features cuda --locked --test conformance --test cuda_graphs --test cuda_prefill \
    --bench kernels --no-run --message-format json |
    python3 -c '
import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] in ("conformance", "cuda_graphs", "cuda_prefill", "kernels"):
        print(artifact["target"]["name"], artifact["executable"])
' | while read -r name program; do strip -o "$folder/$name" "$program"; done
cp target/cuda/engine benches/peers/torch_qwen3.py "$folder/"
cp "$tokenizer"/*.json "$folder/tokenizer/"
cp scripts/gpu-check.sh "$folder/run"
du -sh "$folder"
echo "carry $folder to a machine with a GPU and start its program run there"
