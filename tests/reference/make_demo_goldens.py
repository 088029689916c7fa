"""What the demo model computes in float32 when its own quantised weights are dequantised: the oracle of our quantised kernels.

    python make_demo_goldens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Reads demo/text.txt and demo/chats.json's prompts below; writes demo/expected.safetensors:

    ids            [n]          token ids of the text
    logprobs       [n - 1]      natural log-probability of ids[i + 1] after ids[..=i]
    top_ids        [n - 1, 20]  the likeliest tokens there, best first
    top_logprobs   [n - 1, 20]  their log-probabilities

and demo/chats.json: chat prompts as text and ids, 32 greedy tokens each (fewer if the answer ends), and at each of them the
margin in nats between the two likeliest tokens.
"""

import json
import pathlib
import sys

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import _compile_jinja_template

from make_token_goldens import demo_tokenizer

HERE = pathlib.Path(__file__).parent / "demo"
TOP = 20
GREEDY = 32
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write a haiku about the sea."}],
    [{"role": "system", "content": "You are a pirate. Answer in one sentence."}, {"role": "user", "content": "How are you today?"}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "List three colours, one a line."}],
]


def unpermute(weight, heads):
    """GGUF stores Llama's q and k rows in the order of interleaved rotation; transformers rotates halves."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def load_llama(path):
    """A GGUF file of the llama architecture as a float32 transformers model."""
    reader = GGUFReader(path)
    field = lambda key: reader.fields[f"llama.{key}"].contents()
    tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float() for t in reader.tensors}
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
    )
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"]}
    state["lm_head.weight"] = tensors.get("output.weight", tensors["token_embd.weight"])
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_q", "attn_k"):
                tensor = unpermute(tensor, heads if part == "attn_q" else kv_heads)
            state[f"model.layers.{layer}.{names[part]}.weight"] = tensor
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    path = sys.argv[1]
    tokenizer = demo_tokenizer(path)
    model = load_llama(path)
    ids = tokenizer.encode((HERE / "text.txt").read_text()).ids
    logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    top = logprobs.topk(TOP)
    save_file(
        {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "logprobs": own.contiguous(),
            "top_ids": top.indices.to(torch.int32).contiguous(),
            "top_logprobs": top.values.contiguous(),
        },
        HERE / "expected.safetensors",
    )
    print(f"{len(ids)} tokens, perplexity {(-own.double().mean()).exp():.4f}")

    template = GGUFReader(path).fields["tokenizer.chat_template"].contents()
    end = tokenizer.token_to_id("<|im_end|>")
    out = []
    for messages in CHATS:
        text = _compile_jinja_template(template).render(messages=messages, add_generation_prompt=True)
        prompt = tokenizer.encode(text).ids
        step = model(torch.tensor([prompt]), use_cache=True)
        greedy, margins = [], []
        while len(greedy) < GREEDY and end not in greedy:
            best = step.logits[0, -1].topk(2)
            greedy.append(best.indices[0].item())
            margins.append(round((best.values[0] - best.values[1]).item(), 4))
            step = model(torch.tensor([greedy[-1:]]), past_key_values=step.past_key_values, use_cache=True)
        out.append({"messages": messages, "prompt": text, "ids": prompt, "greedy": greedy, "margins": margins, "text": tokenizer.decode(greedy)})
        print(f"least margin {min(margins)}: {out[-1]['text']!r}")
    (HERE / "chats.json").write_text("[\n" + ",\n".join(json.dumps(chat) for chat in out) + "\n]\n")


if __name__ == "__main__":
    main()
