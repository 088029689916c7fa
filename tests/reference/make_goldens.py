"""Makes tiny random models and what transformers computes with them: float32, on the CPU, from fixed seeds.

    tests/reference/run.sh            makes the environment and runs all make_*.py
    python make_goldens.py            this part alone

For each model writes models/NAME/: config.json and model.safetensors as save_pretrained writes them, and
expected.safetensors with, for prompt number I:

    ids.I     [n]         token ids
    logits.I  [n, vocab]  float32 logits of every position
    greedy.I  [32]        the greedy continuation

The reference always computes in float32, for float16 and bfloat16 weights with the stored values.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

HERE = pathlib.Path(__file__).parent
VOCAB = 256
SHORT = (1, 5, 67)
LONG = (1, 23, 310)
GREEDY = 32
# The least distance between the two best logits on a greedy path, relative to the range of logits: accumulated rounding
# must not decide which token comes next.
MARGIN = 1e-4

LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "attn_implementation": "eager", **changes,
    }))


def qwen2(**changes):
    return Qwen2ForCausalLM(Qwen2Config(**{
        "vocab_size": VOCAB, "hidden_size": 112, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 7,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "attn_implementation": "eager", **changes,
    }))


def qwen3(**changes):
    return Qwen3ForCausalLM(Qwen3Config(**{
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "attn_implementation": "eager", **changes,
    }))


# name: (how to make it, stored dtype, prompt lengths, whether config.json is rewritten as transformers 4 wrote it)
MODELS = {
    "llama-gqa": (lambda: llama(), torch.float32, LONG, True),
    "llama-rope-llama3": (lambda: llama(rope_parameters={"rope_theta": 10000.0, **LLAMA3_SCALING}), torch.float32, LONG, True),
    "llama-rope-linear": (lambda: llama(rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}), torch.float32, SHORT, True),
    "llama-bias": (lambda: llama(attention_bias=True, mlp_bias=True), torch.float32, SHORT, False),
    "llama-f16": (lambda: llama(), torch.float16, SHORT, False),
    "llama-bf16": (lambda: llama(), torch.bfloat16, LONG, False),
    "qwen2": (lambda: qwen2(), torch.float32, SHORT, True),
    "qwen3": (lambda: qwen3(), torch.float32, SHORT, False),
    "qwen3-bf16": (lambda: qwen3(), torch.bfloat16, LONG, False),
    "qwen3-yarn": (lambda: qwen3(rope_parameters={"rope_theta": 1e6, **YARN_SCALING}), torch.float32, LONG, False),
}


def randomize(model, generator):
    """Weights of a size at which every part of the model matters, as in a trained one; the defaults give flat logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise * (0.4 if model.config.tie_word_embeddings else 1.0))
            elif "lm_head" in name:
                parameter.copy_(noise * 3 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 1.3 / parameter.shape[1] ** 0.5)


def as_transformers_4(config):
    """Most models on the hub have rope_theta and rope_scaling where transformers 5 writes rope_parameters."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    if parameters.get("rope_type", "default") != "default":
        config["rope_scaling"] = parameters
    config["torch_dtype"] = config.pop("dtype")


@torch.no_grad()
def expected(model, prompts):
    """Reference results for prompts, and the smallest greedy margin relative to the range of logits."""
    out, least = {}, float("inf")
    for i, prompt in enumerate(prompts):
        step = model(prompt[None], use_cache=True)
        logits = step.logits[0].float()
        greedy = []
        for _ in range(GREEDY):
            last = step.logits[0, -1].float()
            best = last.topk(2).values
            least = min(least, ((best[0] - best[1]) / (last.max() - last.min())).item())
            greedy.append(last.argmax())
            step = model(greedy[-1][None, None], past_key_values=step.past_key_values, use_cache=True)
        out[f"ids.{i}"] = prompt.to(torch.int32)
        out[f"logits.{i}"] = logits.contiguous()
        out[f"greedy.{i}"] = torch.stack(greedy).to(torch.int32)
    return out, least


def make(name):
    build, dtype, lengths, old_config = MODELS[name]
    folder = HERE / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(100):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = build().eval()
        randomize(model, generator)
        model.to(dtype).save_pretrained(folder)
        # Not model.float(): that would keep rotary frequencies rounded to the stored type.
        model = load(folder)
        prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]
        results, margin = expected(model, prompts)
        if margin >= MARGIN or dtype != torch.float32:
            break
    save_file(results, folder / "expected.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if old_config:
        as_transformers_4(config)
    path.write_text(json.dumps(config, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    logits = results["logits.2"]
    print(f"{name}: seed {seed}, margin {margin:.4f}, logits {logits.min():.1f} to {logits.max():.1f}, {size >> 10} KiB")


def add_tokenizer(name):
    """A byte-level BPE vocabulary of 256 tokens, trained on the demo text, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_letters = [c for c in pre_tokenizers.ByteLevel.alphabet() if len(c.encode()) == 1] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"], initial_alphabet=ascii_letters, show_progress=False
    )
    text = (HERE / "demo" / "text.txt").read_text()
    tokenizer.train_from_iterator(["".join(c for c in text if c.isascii())], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(HERE / "models" / name)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def check(name):
    """The files alone give the expected results again."""
    folder = HERE / "models" / name
    model = load(folder)
    results = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(results["ids.2"].long()[None]).logits[0]
    assert torch.allclose(logits, results["logits.2"], atol=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    for name in MODELS:
        make(name)
        check(name)
    add_tokenizer("qwen3")
