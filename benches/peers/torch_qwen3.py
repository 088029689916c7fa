"""The shape of Qwen3-0.6B in PyTorch, beside the engine: same weights, same GPU, same run.

Needs PyTorch and transformers, and a program by `make cuda`; no network. Weights are made up from a seed and written to
a folder, which both sides load:

    python benches/peers/torch_qwen3.py --engine target/cuda/engine --tokenizer ~/.cache/engine/qwen3-tokenizer

Both are timed: prefill, and decoding, for which PyTorch has a static cache and the forward pass in a CUDA graph, once
as it is and once compiled; the attention of a prompt by itself, by each of PyTorch's kernels for it; and, if `--requests`
are asked for, many at once, prompts and all (transformers: continuous batching; the engine: its server). And both must
mean the same model: transformers generates 64 tokens greedily, the engine says what it thinks of each (`echo` with
log-probabilities), and it may be hardly further than PyTorch from what the same weights say in f32. (Texts that both
generate by themselves part early: made-up weights find many tokens nearly as likely.) Prints a page for
benches/results, each row as it is measured; what takes long comes last, as there may be no time for it.

`--shape tiny --device cpu` goes through all of it where there is no GPU.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request

# There is no network where this runs, and no proxy on the way to the engine.
CONNECTION = urllib.request.build_opener(urllib.request.ProxyHandler({}))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch._inductor.config
import transformers
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, StaticCache

SHAPES = {
    "qwen3-0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, vocab_size=151_936),
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, vocab_size=151_936),
}
PROMPT = 100
GREEDY = 64
# Of the engine's pages on a GPU, if it has three times as much. They are not sized by what is free: PyTorch has some of
# that, and gives it back when it likes.
PAGES_GIB = 40


def make_model(folder, shape, device):
    """Writes a model with weights from a seed, and returns it."""
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[shape], max_position_embeddings=40_960, rope_theta=1_000_000.0, tie_word_embeddings=True,
                         attention_bias=False, initializer_range=0.05, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def pages(device):
    """Flags for the engine."""
    if device == "cpu":
        return []
    total = torch.cuda.mem_get_info()[1] >> 30
    return ["--kv-cache-memory", f"{min(PAGES_GIB, max(total // 3, 1))}GiB"]


class Server:
    """The engine, serving the model."""

    def __init__(self, options, folder, device):
        self.url = "http://127.0.0.1:8765"
        line = [options.engine, "--model", folder, "--device", device, "--port", "8765", "--standalone",
                "--max-num-batched-tokens", str(options.max_num_batched_tokens), "--max-num-seqs", "256",
                "--max-model-len", "1024", "--log-level", "warn", *pages(device)]
        environment = dict(os.environ)
        for name in ["ETCD_ENDPOINTS", "NATS_SERVER", "ENGINE_API_KEY"]:
            environment.pop(name, None)
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment)
        for _ in range(600):
            try:
                return CONNECTION.open(self.url + "/health", timeout=10).close()
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError("it has ended")
                time.sleep(0.1)
        self.process.kill()
        raise RuntimeError("it does not start")

    def complete(self, **body):
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body | {"temperature": 0}).encode(),
                                         {"Content-Type": "application/json"})
        with CONNECTION.open(request, timeout=120) as response:
            return json.load(response)["choices"][0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def thought_of(model, tokens):
    """Log-probabilities of all tokens but the prompt's."""
    all_tokens = torch.log_softmax(model(tokens).logits[0, PROMPT - 1 : -1].float(), -1)
    return all_tokens.gather(1, tokens[0, PROMPT:, None])[:, 0].tolist()


@torch.inference_mode()
def agreement(model, server):
    """Compares what both think of the same 64 tokens; a line a figure, and whether it is the same but for rounding."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator).to(model.device)
    tokens = model.generate(prompt, max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, pad_token_id=0)
    theirs = thought_of(model, tokens)
    exact = thought_of(copy.deepcopy(model).float(), tokens)

    scored = server.complete(prompt=tokens[0].tolist(), max_tokens=1, logprobs=1, echo=True)["logprobs"]
    alone = server.complete(prompt=prompt[0].tolist(), max_tokens=GREEDY, logprobs=1, ignore_eos=True)["logprobs"]
    ours = scored["token_logprobs"][PROMPT : PROMPT + GREEDY]
    best = [max(top.values()) for top in scored["top_logprobs"][PROMPT : PROMPT + GREEDY]]
    same = sum(token >= most for token, most in zip(ours, best))
    # Where the engine would choose otherwise, by how much it prefers its own choice.
    regret = max(most - token for token, most in zip(ours, best))

    def apart(some):
        distances = [abs(a - b) for a, b in zip(some, exact, strict=True)]
        return statistics.mean(distances), max(distances)

    # How far rounding to bf16 moves them depends on the weights, so PyTorch's own distance is the measure. What is
    # wrong moves them by units.
    (mean, most), (mean_theirs, most_theirs) = apart(ours), apart(theirs)
    agree = mean <= 1.25 * mean_theirs and most <= 1.25 * most_theirs
    generated = sum(a == b for a, b in zip(alone["tokens"], scored["tokens"][PROMPT : PROMPT + GREEDY]))
    return [
        f"- log-probabilities of transformers' {GREEDY} greedy tokens, and how far they are from PyTorch's in f32: the "
        f"engine's {mean:.4f} on average, {most:.4f} at most; PyTorch's, bf16, {mean_theirs:.4f} and {most_theirs:.4f}",
        f"- {same} of these tokens are the engine's choice too; at others it prefers its own by {regret:.4f} at most",
        f"- generating by itself, the engine goes the same way for {generated} of {GREEDY} tokens (no test: greedy "
        "texts of made-up weights part where two tokens are nearly as likely, and do not meet again)",
    ] + ["- **that is not the same model**: the engine is further from f32 than bf16 explains"] * (not agree), agree


class Clock:
    """Seconds between two points of the device's work."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __enter__(self):
        self.wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.wait()
        self.seconds = time.perf_counter() - self.start


@torch.inference_mode()
def torch_prefill(model, tokens, rounds):
    seconds = []
    for _ in range(rounds + 1):
        prompt = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
        with Clock(model.device) as clock:
            model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).cpu()
        seconds.append(clock.seconds)
    return tokens / statistics.median(seconds[1:])


@torch.no_grad()
def torch_decode(model, sequences, context, steps, rounds, how):
    """Tokens a second with a static cache: steps fed with their own token, launched one by one ("eager"), recorded in a
    CUDA graph ("graph"), or compiled, which records them too ("compiled")."""
    cache = StaticCache(config=model.config, max_cache_len=context + steps + 1)
    prompt = torch.randint(model.config.vocab_size, (sequences, context), device=model.device)
    # All in place: graphs know where things are.
    token, position = prompt[:, -1:].clone(), torch.tensor([context], device=model.device)

    def begin():
        cache.reset()
        model(prompt, past_key_values=cache, logits_to_keep=1, cache_position=torch.arange(context, device=model.device))
        token.copy_(prompt[:, -1:])
        position.fill_(context)

    def following(token, position):
        logits = model(token, past_key_values=cache, cache_position=position, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    if how == "compiled":
        # Rather an error than a peer that silently does without graphs.
        if hasattr(torch._inductor.config.triton, "cudagraph_or_error"):
            torch._inductor.config.triton.cudagraph_or_error = True
        following = torch.compile(following, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def step():
        token.copy_(following(token, position))
        position.add_(1)

    if how == "graph":
        # What is recorded has to have run before, beside the stream that all else is on.
        begin()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    rates = []
    for _ in range(rounds + 2):
        begin()
        with Clock(model.device) as clock:
            for _ in range(steps):
                step()
        rates.append(sequences * steps / clock.seconds)
    return statistics.median(rates[2:])


def prompts_of(model, requests, tokens):
    """No two alike, so that nobody finds a beginning in a cache."""
    return torch.randint(model.config.vocab_size, (requests, tokens)).tolist()


def engine_serving(server, model, options):
    """Tokens a second of answers, all asked for at once; the median of some rounds."""
    rates = []
    with concurrent.futures.ThreadPoolExecutor(options.requests) as pool:
        for _ in range(options.rounds_serving + 1):
            ask = lambda prompt: server.complete(prompt=prompt, max_tokens=options.answer, ignore_eos=True)
            prompts = prompts_of(model, options.requests, options.context)
            start = time.perf_counter()
            list(pool.map(ask, prompts))
            rates.append(options.requests * options.answer / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def torch_serving(model, options):
    """The same of transformers' continuous batching, or a sentence that says why not."""
    known = inspect.signature(model.generate_batch).parameters if hasattr(model, "generate_batch") else {}
    if "persistent_manager" not in known:
        return (f"transformers {transformers.__version__} has no `generate_batch` that keeps what it has prepared "
                "(`persistent_manager`): continuous batching is not measured; release 5.10 has it")
    # A flash kernel would be fetched if none is installed, unless one says not to: the configuration has a field for it
    # from some release on (5.24 has it, 5.17 has not), and before that the attention's name does it.
    options_known = {field.name for field in dataclasses.fields(transformers.ContinuousBatchingConfig)}
    flash = importlib.util.find_spec("flash_attn") is not None
    generation = GenerationConfig(max_new_tokens=options.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    attention = model.config._attn_implementation
    rates = []
    try:
        if "auto_switch_to_flash" in options_known:
            batching = transformers.ContinuousBatchingConfig(auto_switch_to_flash=flash)
        else:
            batching = transformers.ContinuousBatchingConfig()
            if not flash:
                model.set_attn_implementation("paged|sdpa")
        for _ in range(options.rounds_serving + 1):
            prompts = prompts_of(model, options.requests, options.context)
            start = time.perf_counter()
            answers = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching,
                                           persistent_manager=True)
            seconds = time.perf_counter() - start
            tokens = sum(len(answer.generated_tokens) for answer in answers.values())
            if tokens != options.requests * options.answer:
                asked = options.requests * options.answer
                return f"transformers' continuous batching failed: it gave {tokens} tokens of {asked}"
            rates.append(tokens / seconds)
    except Exception as error:  # Of whatever kind: there are other rows.
        return f"transformers' continuous batching failed: {type(error).__name__}: {error}"
    finally:
        getattr(model, "destroy_cached_continuous_batching_manager", lambda: None)()
        # What is measured after this is measured as what was before.
        model.set_attn_implementation(attention)
    return statistics.median(rates[1:])


def torch_attention(config, tokens, device, backend, rounds):
    """Milliseconds of the attention of one layer over a prompt, by one of SDPA's kernels."""
    shape = lambda heads: (1, heads, tokens, config.head_dim)
    make = lambda heads: torch.randn(shape(heads), device=device, dtype=torch.bfloat16)
    q, k, v = make(config.num_attention_heads), make(config.num_key_value_heads), make(config.num_key_value_heads)
    # Many in a row: one takes hardly longer than to launch it.
    times, calls = [], 20 if device.type == "cuda" else 1
    with torch.nn.attention.sdpa_kernel(backend):
        for _ in range(rounds + 1):
            with Clock(device) as clock:
                for _ in range(calls):
                    torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            times.append(clock.seconds * 1e3 / calls)
    return statistics.median(times[1:])


def engine_bench(options, folder, device, prefill, decode):
    """What it measured, by what and of how many, and why there is no more of it, if there should be."""
    line = [options.engine, "bench", "--model", folder, "--device", device, "--json", "--log-level", "warn",
            "--prefill", ",".join(map(str, prefill)), "--decode", ",".join(map(str, decode)),
            "--context", str(options.context), "--steps", str(options.steps), "--rounds", str(options.rounds),
            "--max-num-batched-tokens", str(options.max_num_batched_tokens), *pages(device)]
    ran = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    rates = {}
    for row in map(json.loads, filter(None, ran.stdout.splitlines())):
        rates[row["measured"], row.get("tokens") or row["sequences"]] = row
    return rates, f"the engine's bench failed with exit code {ran.returncode}" if ran.returncode else ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True, help="the program")
    parser.add_argument("--tokenizer", required=True, help="folder of a Qwen3 tokenizer.json, which a server needs")
    parser.add_argument("--work", default="/tmp/torch-qwen3", help="folder for the model")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prefill", default="2048,16384")
    parser.add_argument("--decode", default="1,64,256")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="requests that are made at once; 0: none are")
    parser.add_argument("--answer", type=int, default=128, help="tokens that each of them asks for")
    parser.add_argument("--rounds-serving", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    options = parser.parse_args()
    prefill, decode = ([int(each) for each in text.split(",")] for text in (options.prefill, options.decode))
    device = torch.device(options.device)
    ours = "cuda:0" if options.device == "cuda" else "cpu"
    say = functools.partial(print, flush=True)

    folder = pathlib.Path(options.work) / options.shape
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(folder, options.shape, device)
    for file in pathlib.Path(options.tokenizer).glob("*.json"):
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, folder)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPUs"
    versions = f"PyTorch {torch.__version__} and transformers {transformers.__version__}"
    say(f"{options.shape} in bf16 beside {versions} on {name}\n")
    notes = []

    def note(text):
        # At once for whoever looks on, and whatever ends this before the table ends.
        print(text, file=sys.stderr, flush=True)
        notes.append(text)

    backends = [SDPBackend.FLASH_ATTENTION]
    if options.device == "cuda":
        # What SDPA chooses by itself from PyTorch 2.11 on.
        backends.append(SDPBackend.CUDNN_ATTENTION)
    for tokens in prefill:
        for backend in backends:
            what = f"PyTorch's attention of one layer over {tokens:,} tokens, {backend.name}"
            try:
                milliseconds = torch_attention(model.config, tokens, device, backend, options.rounds)
            except Exception as error:  # Of whatever kind: there are other rows.
                note(f"{what}, failed: {type(error).__name__}: {error}")
                continue
            # Two operations each of a product of two, for half of all pairs.
            rate = 2 * tokens * (tokens + 1) * model.config.num_attention_heads * model.config.head_dim / milliseconds / 1e9
            say(f"- {what}: {milliseconds:.3f} ms, {rate:,.0f} Tflop/s")

    first, failure = engine_bench(options, str(folder), ours, prefill, decode)
    if failure:
        note(failure)
    say("\n| | engine, tokens/s | PyTorch, tokens/s | ratio | engine, GB/s read |\n| --- | --- | --- | --- | --- |")

    def say_row(kind, size, how, measure):
        row = first.get((kind, size), {})
        try:
            theirs = measure()
        except Exception as error:  # Of whatever kind: there are other rows.
            note(f"PyTorch's {kind} of {size:,}, {how}, failed: {type(error).__name__}: {error}")
            theirs = math.nan
        what = f"prefill of {size:,} tokens" if kind == "prefill" else f"decode, {size} at {options.context} tokens"
        rate, read = row.get("tokens_per_second", math.nan), row.get("gigabytes_read_per_second")
        ratio, read = f"{rate / theirs:.2f}×", f"{read:,.0f}" if read else "–"
        say(f"| {what}; PyTorch: {how} | {rate:,.0f} | {theirs:,.0f} | {ratio} | {read} |")

    def say_decode(sequences, how, words):
        shape = sequences, options.context, options.steps, options.rounds
        say_row("decode", sequences, words, lambda: torch_decode(model, *shape, how))

    # Launched one by one, on both sides.
    for tokens in prefill:
        say_row("prefill", tokens, "eager", lambda: torch_prefill(model, tokens, options.rounds))
    if options.device == "cuda":
        for sequences in decode:
            say_decode(sequences, "graph", "static cache, a CUDA graph")
        # It takes long for each number of sequences.
        for sequences in decode[:2]:
            say_decode(sequences, "compiled", "static cache, compiled")
    else:
        for sequences in decode:
            say_decode(sequences, "eager", "static cache, eager")

    agree, served = True, math.nan
    try:
        with Server(options, str(folder), ours) as server:
            lines, agree = agreement(model, server)
            say("\n" + "\n".join(lines))
            if options.requests:
                served = engine_serving(server, model, options)
    except Exception as error:  # Of whatever kind: there are other rows.
        note(f"asking the engine's server failed: {type(error).__name__}: {error}")
    if options.requests:
        theirs = torch_serving(model, options)
        what = f"{options.requests} requests at once, {options.context} + {options.answer} tokens each, HTTP and prefill too"
        if isinstance(theirs, str):
            note(theirs)
            say(f"- {what}: the engine gives {served:,.0f} tokens/s")
        else:
            say(f"- {what}: the engine gives {served:,.0f} tokens/s, transformers' continuous batching {theirs:,.0f} "
                f"({served / theirs:.2f}×)")
            if options.device == "cuda" and importlib.util.find_spec("flash_attn") is None:
                note("transformers' continuous batching has no flash kernel here (`flash_attn` is not installed): its "
                     "attention is SDPA with a mask over gathered pages, and it launches kernels without CUDA graphs")
    for text in notes:
        say(f"- {text}")
    # What PyTorch keeps for later is what the engine needs now.
    torch.compiler.reset()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    second, failure = engine_bench(options, str(folder), ours, prefill, decode)
    if failure:
        note(failure)
        say(f"- {failure}")
    say("- the engine once more, after PyTorch's turn, in tokens/s: " + ", ".join(
        f"{kind} {size:,}: {row['tokens_per_second']:,.0f}" for (kind, size), row in second.items()))
    sys.exit(0 if agree and not any("failed" in note for note in notes) else 1)


if __name__ == "__main__":
    main()
