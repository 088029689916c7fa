"""Writes a GGUF file of F16 weights that are made up, in the shape of a config.json, with Qwen3's tokenizer.

    python made_up_gguf.py benches/shapes/qwen3-0.6b ~/.cache/engine/qwen3-tokenizer OUT.gguf

For scripts/make-shape-gguf.sh, which makes other types of it. How fast a model is computed depends on its shape and its
types, not on its weights, so those of a real one need not be fetched to measure it. Needs the packages gguf and numpy.
"""

import json
import pathlib
import sys

import numpy as np
from gguf import GGUFWriter, LlamaFileType, TokenType

DEVIATION = np.float32(0.02)


def add_hyperparameters(writer, config):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(LlamaFileType.MOSTLY_F16)


def add_tokenizer(writer, tokenizer, rows):
    """`rows`: of the embedding, which has some more than there are tokens."""
    ids = dict(tokenizer["model"]["vocab"])
    types = [TokenType.UNUSED] * rows
    for id in ids.values():
        types[id] = TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    tokens = [f"[PAD{id}]" for id in range(rows)]
    for token, id in ids.items():
        tokens[id] = token
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_add_bos_token(False)


def add_weights(writer, config):
    rng = np.random.default_rng(1)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))

    def matrix(name, rows, columns):
        values = rng.standard_normal((rows, columns), dtype=np.float32) * DEVIATION
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def norm(name, length):
        writer.add_tensor(f"{name}.weight", np.ones(length, np.float32))

    matrix("token_embd", config["vocab_size"], hidden)
    norm("output_norm", hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm", hidden)
        matrix(f"{block}.attn_q", q, hidden)
        matrix(f"{block}.attn_k", kv, hidden)
        matrix(f"{block}.attn_v", kv, hidden)
        norm(f"{block}.attn_q_norm", config["head_dim"])
        norm(f"{block}.attn_k_norm", config["head_dim"])
        matrix(f"{block}.attn_output", hidden, q)
        norm(f"{block}.ffn_norm", hidden)
        matrix(f"{block}.ffn_gate", ffn, hidden)
        matrix(f"{block}.ffn_up", ffn, hidden)
        matrix(f"{block}.ffn_down", hidden, ffn)


def main():
    shape, tokenizer, out = map(pathlib.Path, sys.argv[1:])
    config = json.loads((shape / "config.json").read_text())
    if config["model_type"] != "qwen3" or not config["tie_word_embeddings"]:
        sys.exit(f"shape: {shape} is not a Qwen3 with tied embeddings, and no other is written")
    tokenizer = json.loads((tokenizer / "tokenizer.json").read_text())
    last = max(token["id"] for token in tokenizer["added_tokens"])
    if config["vocab_size"] <= last:
        sys.exit(f"shape: {shape} has {config['vocab_size']} tokens, and Qwen3's tokenizer {last + 1}")
    writer = GGUFWriter(out, "qwen3")
    writer.add_name(f"{shape.name} with made-up weights")
    add_hyperparameters(writer, config)
    add_tokenizer(writer, tokenizer, config["vocab_size"])
    add_weights(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
