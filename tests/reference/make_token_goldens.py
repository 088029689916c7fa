"""Encodes difficult texts with Hugging Face's tokenizers; the results are goldens of models/src/tokenizer.

    python make_token_goldens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf path/to/qwen3/tokenizer.json

For the demo model the tokenizer is put together here from the GGUF file's vocabulary and the pre-tokenizer of SmolLM2's own
tokenizer.json (single digits, then GPT-2's words). Writes tokens.json beside this file: ids of each text, and what decoding
gives with and without special tokens.
"""

import json
import pathlib
import sys

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXTS = [
    "", " ", "  ", "\n", "\r\n", "\t", "a", " a", "a ", "Hello, world!", "Hello  world   three    four",
    "The quick brown fox jumps over the lazy dog.", "don't can't we'll I'd they've you're it's 'tis DON'T WE'LL",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n", "line one\nline two\r\nline three\rline four",
    "   leading", "trailing   ", "a\u00a0b\u2003c\u3000d", "\n\n\n", " \n \n ", "tabs\t\t\tand spaces \t \t",
    "1234567890", "3.14159 1,000,000 0x1F 1e-10", "١٢٣ ४५६ ⅣⅤ ½ ²³", "v1.2.3-rc.4+build.567",
    "汉字测试，你好世界！", "日本語のテキスト。カタカナ ひらがな", "한국어 문장입니다.", "Привет, как дела?", "مرحبا بالعالم", "שלום עולם",
    "ภาษาไทย", "हिन्दी में लिखा", "Ελληνικά", "Zażółć gęślą jaźń", "e\u0301 vs \u00e9, n\u0303 vs ñ", "ﬁ ligature ﬀ", "Å vs \u212b",
    "👍", "👩‍👩‍👧‍👦", "🏳️‍🌈 🇩🇪🇫🇷", "👋🏽 👋🏿", "a👍b", "😀😁😂🤣😃😄", "\u200d\u200b\ufeff", "z\u0335a\u0335l\u0335g\u0335o\u0335",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|", "<|im_end|><|im_end|>", "text<|endoftext|>more",
    " <|im_end|> ", "<|IM_END|>", "<think>\nhm\n</think>\n\n", "<tool_call>{\"name\": \"f\"}</tool_call>", "<s></s>[INST]",
    "\u0000", "\u0001\u0002\u001f\u007f", "\u0080\u009f\u00ad", "\ud7ff\ue000\uffff", "\U0010ffff",
    "https://example.com/a?b=c&d=%20#e", "user@example.com", "C:\\Windows\\System32", "$100 €50 £20 ¥5", "a_b-c.d/e|f~g`h^i",
    "!!!!????....----____====", "((([[[{{{<<<>>>}}}]]])))", "ALLCAPSWORD mixedCaseWord snake_case_word", "supercalifragilisticexpialidocious",
    "a" * 10_000, "ab " * 500, " " * 1000, "\n" * 300, "9" * 1000, "漢" * 500, "👍" * 200, "-" * 777, "Ġ Ċ ĉ ▁ <0x0A>",
]


def demo_tokenizer(path):
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types) if k == 3])
    return tokenizer


def main():
    vocabularies = {"smollm2": demo_tokenizer(sys.argv[1]), "qwen3": Tokenizer.from_file(sys.argv[2])}
    out = []
    for text in TEXTS:
        case = {"text": text}
        for name, tokenizer in vocabularies.items():
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            case[name] = {
                "ids": ids,
                "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                "without_special": tokenizer.decode(ids, skip_special_tokens=True),
            }
            for key in ("decoded", "without_special"):
                if case[name][key] == text:
                    del case[name][key]
        out.append(case)
    path = pathlib.Path(__file__).with_name("tokens.json")
    path.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in out) + "\n]\n")


if __name__ == "__main__":
    main()
