"""Makes tiny random GGUF files in every tensor type the engine reads, and what transformers computes from the same weights
dequantised to float32.

    python make_gguf_goldens.py

gguf/NAME.gguf is a one-layer model; gguf/NAME.safetensors has ids [n] and logits [n, vocab]. The gguf package quantises the
32-element types; for the K-quants and IQ4, which it can only read, random blocks are made (every bit pattern of a block is
a valid weight, so these cover more than a quantiser would produce). Scales are chosen so that weights look like a trained
model's.
"""

import pathlib

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter, dequantize, quantize
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from make_demo_goldens import unpermute

HERE = pathlib.Path(__file__).parent / "gguf"
VOCAB, HIDDEN, HEADS, KV_HEADS, FFN, PROMPT = 64, 256, 4, 1, 256, 70
HEAD_DIM = HIDDEN // HEADS

# name: (architecture, type of the embedding (tied), of the attention's weights, of the MLP's)
FILES = {
    "q4_0-q4_1": ("llama", T.Q8_0, [T.Q4_0] * 4, [T.Q4_1] * 3),
    "q5_0-q5_1": ("qwen2", T.Q5_1, [T.Q5_0] * 4, [T.Q5_1] * 3),
    "q8_0-q6_k": ("qwen3", T.Q6_K, [T.Q8_0] * 4, [T.Q6_K] * 3),
    "q4_k-q5_k": ("llama", T.Q4_K, [T.Q4_K] * 4, [T.Q5_K] * 3),
    # As the mixed recipes of llama.cpp do it: q, k and v of different types, f16, bf16 and f32 among them.
    "mixed": ("llama", T.F16, [T.Q4_0, T.BF16, T.Q6_K, T.F16], [T.Q4_K, T.Q5_0, T.F32]),
    "q3_k-iq4": ("llama", T.Q3_K, [T.Q3_K, T.IQ4_NL, T.IQ4_XS, T.IQ4_XS], [T.IQ4_NL, T.Q3_K, T.IQ4_XS]),
}


# Of types whose blocks have one scale: bytes of a block but for it, whether it comes first, and the deviation of what it
# multiplies where all bits are random.
ONE_SCALE = {
    T.Q3_K: (108, False, 18.5 * 2.35),
    T.Q6_K: (208, False, 74 * 18.5),
    T.IQ4_NL: (16, True, 67.4),
    T.IQ4_XS: (134, True, 18.5 * 67.4),
}


def random_blocks(kind, rows, cols, rng):
    """Random blocks of a K-quant or IQ4 whose values have a mean near 0 and a deviation near 1/16."""
    blocks = rows * cols // GGML_QUANT_SIZES[kind][0]
    if kind in ONE_SCALE:
        size, first, deviation = ONE_SCALE[kind]
        bits = rng.integers(256, size=(blocks, size), dtype=np.uint8)
        scales = np.full((blocks, 1), (1 / 16) / deviation, np.float16).view(np.uint8)
        data = np.concatenate([scales, bits] if first else [bits, scales], axis=1)
    else:
        quants, middle = (128, 7.5) if kind == T.Q4_K else (160, 15.5)
        scale = (1 / 16) / (32 * middle)
        head = np.tile(np.array([scale, scale * middle], np.float16), (blocks, 1)).view(np.uint8)
        data = np.concatenate([head, rng.integers(256, size=(blocks, 12 + quants), dtype=np.uint8)], axis=1)
    return data.reshape(rows, -1)


def make_tensor(kind, rows, cols, rng):
    """Bytes of a random tensor of a type, and the weights they stand for."""
    if kind in ONE_SCALE or kind in (T.Q4_K, T.Q5_K):
        data = random_blocks(kind, rows, cols, rng)
    else:
        data = quantize(rng.standard_normal((rows, cols), dtype=np.float32) * 1.2 / cols**0.5, kind)
    return data, torch.from_numpy(dequantize(data, kind).astype(np.float32).reshape(rows, cols).copy())


def make(name, index):
    architecture, embedding, attention, mlp = FILES[name]
    rng = np.random.default_rng(index)
    writer = GGUFWriter(HERE / f"{name}.gguf", architecture)
    writer.add_name(f"random {name}")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(0x21 + i) for i in range(VOCAB - 1)] + ["!!"])
    writer.add_token_merges(["! !"])

    state = {}

    def add(gguf_name, name, kind, rows, cols, heads=None):
        data, weights = make_tensor(kind, rows, cols, rng)
        writer.add_tensor(f"{gguf_name}.weight", data, raw_dtype=kind)
        state[f"{name}.weight"] = unpermute(weights, heads) if heads and architecture == "llama" else weights

    def add_vector(gguf_name, name, size, mean):
        values = (mean + 0.2 * rng.standard_normal(size)).astype(np.float32)
        writer.add_tensor(gguf_name, values)
        state[name] = torch.from_numpy(values)

    block, layer = "blk.0", "model.layers.0"
    add("token_embd", "model.embed_tokens", embedding, VOCAB, HIDDEN)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    add_vector("output_norm.weight", "model.norm.weight", HIDDEN, 3.0)
    add_vector(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", HIDDEN, 1.0)
    add_vector(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", HIDDEN, 1.0)
    q, k, v, o = attention
    kv_width = KV_HEADS * HEAD_DIM
    add(f"{block}.attn_q", f"{layer}.self_attn.q_proj", q, HIDDEN, HIDDEN, HEADS)
    add(f"{block}.attn_k", f"{layer}.self_attn.k_proj", k, kv_width, HIDDEN, KV_HEADS)
    add(f"{block}.attn_v", f"{layer}.self_attn.v_proj", v, kv_width, HIDDEN)
    add(f"{block}.attn_output", f"{layer}.self_attn.o_proj", o, HIDDEN, HIDDEN)
    if architecture == "qwen2":
        for part, width in (("q", HIDDEN), ("k", kv_width), ("v", kv_width)):
            add_vector(f"{block}.attn_{part}.bias", f"{layer}.self_attn.{part}_proj.bias", width, 0.0)
    if architecture == "qwen3":
        for part in "qk":
            add_vector(f"{block}.attn_{part}_norm.weight", f"{layer}.self_attn.{part}_norm.weight", HEAD_DIM, 1.0)
    gate, up, down = mlp
    add(f"{block}.ffn_gate", f"{layer}.mlp.gate_proj", gate, FFN, HIDDEN)
    add(f"{block}.ffn_up", f"{layer}.mlp.up_proj", up, FFN, HIDDEN)
    add(f"{block}.ffn_down", f"{layer}.mlp.down_proj", down, HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    shape = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, head_dim=HEAD_DIM, attn_implementation="eager",
    )
    families = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
    model_class, config_class = families[architecture]
    model = model_class(config_class(**shape)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    ids = torch.from_numpy(rng.integers(VOCAB, size=PROMPT))
    with torch.no_grad():
        logits = model(ids[None]).logits[0].contiguous()
    save_file({"ids": ids.to(torch.int32), "logits": logits}, HERE / f"{name}.safetensors")
    size = (HERE / f"{name}.gguf").stat().st_size
    print(f"{name}: logits {logits.min():.1f} to {logits.max():.1f}, deviation {logits.std():.2f}, {size >> 10} KiB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    for index, name in enumerate(FILES):
        make(name, index)
