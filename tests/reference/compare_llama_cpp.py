"""Measures llama.cpp on the demo text against the same goldens as our own backends.

    python -c "print(open('demo/text.txt').read() * 3, end='')" > /tmp/text3.txt
    llama-perplexity -m SmolLM2-135M-Instruct.Q4_1.gguf -f /tmp/text3.txt -c 2048 -b 2048 --chunks 1 --kl-divergence-base /tmp/llama.bin
    python compare_llama_cpp.py /tmp/llama.bin

llama-perplexity wants twice its context of text, scores the second half of each context (here positions 1024 to 2046) and
writes their log-probabilities, in 16 bits over a range of 16 nats: the goldens' text is repeated, and one context scored.
"""

import pathlib
import struct
import sys

import numpy as np
from safetensors.numpy import load_file

goldens = load_file(pathlib.Path(__file__).parent / "demo" / "expected.safetensors")
data = pathlib.Path(sys.argv[1]).read_bytes()
assert data[:8] == b"_logits_"
context, vocabulary, chunks = struct.unpack_from("<iii", data, 8)
tokens = np.frombuffer(data, np.int32, context, 20)
assert (tokens == goldens["ids"][:context]).all()
first, width = context // 2, (vocabulary + 1) // 2 * 2 + 4
rows = np.frombuffer(data, np.uint16, (context - 1 - first) * width, 20 + 4 * context * chunks).reshape(-1, width)
scale, low = rows[:, :4].copy().view(np.float32).T
values = rows[:, 4 : 4 + vocabulary]
where = slice(first, context - 1)
own = low + scale * values[np.arange(len(rows)), tokens[first + 1 :]]
theirs = goldens["logprobs"][where].astype(float)
best = values.argmax(1)
top_ids, top = goldens["top_ids"][where], goldens["top_logprobs"][where]
rank = (top_ids == best[:, None]).argmax(1)
assert (top_ids[np.arange(len(rows)), rank] == best).all()
regret = np.sort(top[:, 0] - top[np.arange(len(rows)), rank])
perplexity, reference = np.exp(-own.mean()), np.exp(-theirs.mean())
print(f"perplexity {perplexity:.4f}, reference {reference:.4f} ({100 * (perplexity / reference - 1):+.3f} %)")
print(f"deviation of a token's log-probability {np.std(own - theirs):.4f} nat")
print(f"{len(rows)} positions, same best token at {100 * (regret == 0).mean():.1f} %")
print(f"regret mean {regret.mean():.5f}, p99 {regret[-(-len(regret) * 99 // 100) - 1]:.4f}, worst {regret[-1]:.4f} nat")
