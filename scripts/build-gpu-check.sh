#!/bin/sh
# Builds the kernels' tests with the real CUDA driver in them as programs that need nothing but a device and its driver:
# target/cuda/gpu-check-*. CUDA_HOME says where nvcc is.
set -eu
cd "$(dirname "$0")/.."

rm -rf target/cuda/gpu-check-*
mkdir -p target/cuda
# As `cargo test --workspace` builds them: another selection means other features, and compiling everything again.
cargo test --workspace --features cuda --locked --test conformance --test cuda_steps --test cuda_prefill \
    --bench kernels --no-run --message-format json |
    python3 -c '
import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] in ("conformance", "cuda_steps", "cuda_prefill", "kernels"):
        print(artifact["target"]["name"], artifact["executable"])
' | while read -r name program; do strip -o "target/cuda/gpu-check-$name" "$program"; done
ls -lh target/cuda/gpu-check-*
echo "on a machine with a GPU run gpu-check-cuda_prefill, gpu-check-conformance and gpu-check-cuda_steps, each with"
echo "--ignored cuda_device; the first says first whether the tensor cores' fragments lie where the emulation has them"
echo "and, for a table of times: gpu-check-kernels"
