#!/bin/sh
# Makes target/cuda/gpu-check, a folder that needs nothing but a GPU and its driver: the engine, which carries the
# checks and benchmarks of its kernels, what compares it with PyTorch, what measures two workers and the services that
# they take, and `run`, which runs them all, in three goes (scripts/gpu-check.sh). nvcc is there (CUDA_HOME), and so are
# the services (`make setup-services`). The same as an archive is what to carry where bytes are counted.
set -eu
cd "$(dirname "$0")/.."

folder=target/cuda/gpu-check
tokenizer=${XDG_CACHE_HOME:-$HOME/.cache}/engine/qwen3-tokenizer
rm -rf "$folder"
mkdir -p "$folder/tokenizer"
# Both at once: by itself the engine would have other features of some crates, and they would be compiled again.
built=$(cargo build --release --locked --features cuda --bin engine --bench disaggregation \
    --message-format json-render-diagnostics | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
strip -o "$folder/engine" "$(echo "$built" | grep '/engine$')"
strip -o "$folder/disaggregation" "$(echo "$built" | grep '/disaggregation-')"
for service in etcd nats-server; do
    strip -o "$folder/$service" "$(PATH=$PATH:/usr/sbin command -v $service)"
done
cp benches/peers/torch_qwen3.py "$folder/"
cp -r benches/shapes/* "$folder/"
cp "$tokenizer"/*.json "$folder/tokenizer/"
cp scripts/gpu-check.sh "$folder/run"
# The commit that it is built from, which each page names.
git describe --always --dirty >"$folder/commit" 2>/dev/null || echo unknown >"$folder/commit"
XZ_OPT=-T0 tar -C target/cuda -cJf "$folder.tar.xz" gpu-check
du -sh "$folder" "$folder.tar.xz"
echo "carry $folder.tar.xz to a machine with a GPU, and there: tar xf gpu-check.tar.xz && gpu-check/run"
echo "(benches/results/README.md says what else it runs)"
