"""Makes tiny models with weights of eight-bit floats, as tools publish them, and what transformers computes with them.

    tests/reference/run.sh            makes the environment and runs all make_*.py
    python make_fp8_goldens.py        this part alone

For each model writes models/NAME/ as make_goldens.py does; the reference computes in float32, with each weight its E4M3
times its scale. Some modules of each are not quantised:

    qwen3-fp8         transformers and DeepSeek: scales in bf16 for blocks of 128 by 128
    llama-fp8         llm-compressor's FP8_DYNAMIC: scales in bf16 for rows
    qwen2-fp8-static  AutoFP8: a scale in f32 for a matrix, and one for activations, which the reference does not use
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
from transformers.utils.logging import disable_progress_bar

from make_goldens import MARGIN, SHORT, VOCAB, expected, llama, qwen2, qwen3, randomize

HERE = pathlib.Path(__file__).parent
LARGEST = 448.0


def blocks(weight):
    rows, cols = [(extent + 127) // 128 for extent in weight.shape]
    scale = torch.empty(rows, cols)
    for i in range(rows):
        for j in range(cols):
            scale[i, j] = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].abs().max() / LARGEST
    scale = scale.bfloat16()
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight_scale_inv": scale}, spread.float()


def rows(weight):
    scale = (weight.abs().amax(1, keepdim=True) / LARGEST).bfloat16()
    return {"weight_scale": scale}, scale.float()


def whole(weight):
    scale = weight.abs().max() / LARGEST
    return {"weight_scale": scale, "input_scale": torch.tensor(0.03)}, scale


COMPRESSED = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
        }
    },
    "format": "float-quantized",
    "ignore": ["lm_head", "model.layers.1.self_attn.o_proj"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}

# name: (how to make it, how to scale it, its quantization_config)
MODELS = {
    "qwen3-fp8": (
        lambda: qwen3(hidden_size=128, intermediate_size=256),
        blocks,
        {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"],
        },
    ),
    "llama-fp8": (lambda: llama(hidden_size=128, intermediate_size=192, num_attention_heads=8), rows, COMPRESSED),
    "qwen2-fp8-static": (
        lambda: qwen2(),
        whole,
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", "model.layers.0.self_attn.k_proj"]},
    ),
}


def is_quantised(name, config):
    ignored = [*config.get("modules_to_not_convert", []), *config.get("ignored_layers", []), *config.get("ignore", [])]
    return name.endswith("_proj.weight") and name.removesuffix(".weight") not in ignored


def make(name):
    build, scaling, quantization = MODELS[name]
    folder = HERE / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(100):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = build().eval()
        randomize(model, generator)
        tensors, weights = {}, {}
        for key, weight in model.state_dict().items():
            if key == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            if is_quantised(key, quantization):
                scales, spread = scaling(weight)
                # Rounded scales may be a little too small.
                quants = (weight / spread).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
                tensors[key] = quants
                tensors |= {f"{key.removesuffix('weight')}{end}": scale for end, scale in scales.items()}
                weights[key] = quants.float() * spread
            else:
                tensors[key] = weight.bfloat16()
                weights[key] = tensors[key].float()
        model.load_state_dict(weights, strict=False)
        prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in SHORT]
        results, margin = expected(model, prompts)
        if margin >= MARGIN:
            break
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(results, folder / "expected.safetensors")
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": quantization}
    path.write_text(json.dumps(config, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: seed {seed}, margin {margin:.4f}, {size >> 10} KiB")
    return weights


def check(name, weights):
    """transformers understands the files alike, as far as bf16 shows, in which it dequantises. (It takes blocks to be
    equally large, and 128 to divide what they cover. AutoFP8's files it does not take.)"""
    quantization = MODELS[name][2]
    method = FineGrainedFP8Config if quantization["quant_method"] == "fp8" else CompressedTensorsConfig
    config = method(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(HERE / "models" / name, quantization_config=config)
    theirs = model.state_dict()
    for key, weight in weights.items():
        assert torch.equal(theirs[key].bfloat16(), weight.bfloat16()), f"{name}: {key}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    for name in MODELS:
        weights = make(name)
        if MODELS[name][1] is not whole:
            check(name, weights)
