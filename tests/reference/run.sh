#!/bin/sh
# Makes all goldens and fixtures of this folder anew. Needs the demo model and Qwen3's tokenizer (`make demo-model
# test-assets`) and, the first time, the network: PyTorch and transformers go into an environment in the cache folder.
set -eu

cd "$(dirname "$0")"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
demo=${ENGINE_DEMO_MODEL:-$cache/SmolLM2-135M-Instruct.Q4_1.gguf}
qwen3=$cache/qwen3-tokenizer
for file in "$demo" "$qwen3/tokenizer.json"; do
    [ -f "$file" ] || { echo "goldens: $file is not there; run make demo-model test-assets" >&2; exit 1; }
done

venv=$cache/goldens-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
# Returns at once where all of it is there.
"$venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
python=$venv/bin/python
"$python" make_template_goldens.py "$qwen3/tokenizer_config.json" "$demo"
"$python" make_token_goldens.py "$demo" "$qwen3/tokenizer.json"
"$python" make_goldens.py
"$python" make_fp8_goldens.py
"$python" make_gguf_goldens.py
"$python" make_demo_goldens.py "$demo"
