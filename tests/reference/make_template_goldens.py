"""Renders chat templates with transformers' own environment; the results are the goldens of src/api/template/tests.rs.

    python make_template_goldens.py path/to/qwen3/tokenizer_config.json path/to/SmolLM2-135M-Instruct.Q4_1.gguf

`scripts/fetch-test-assets.sh` fetches both. Writes templates.json beside this file.
"""

import json
import pathlib
import sys

from gguf import GGUFReader
from transformers.utils.chat_template_utils import _compile_jinja_template

WEATHER_CALL = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3, "units": None}}}

CHATS = {
    "one user message": [{"role": "user", "content": "What is 2+2?"}],
    "system and user": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&'\"there\"</b>"}],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?\n\nFour?"},
        {"role": "assistant", "content": "Five.\n"},
        {"role": "user", "content": "  Six  "},
    ],
    "thinking in history": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "let me see"},
    ],
    "ends with the assistant": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "<think>\nok\n</think>\n\nYes"}],
    "unicode": [{"role": "user", "content": "👩‍👩‍👧‍👦 汉字 ﷽ e\u0301 \u2028 \u0000 <|im_end|>"}],
    "empty content": [{"role": "user", "content": ""}],
}

TOOL_CHATS = {
    "tool call and result": [
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [WEATHER_CALL]},
        {"role": "tool", "content": '{"celsius": 21.5}', "tool_call_id": "call_1"},
    ],
    "two calls and text arguments": [
        {"role": "user", "content": "Both?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                {"type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}},
                {"type": "function", "function": {"name": "b", "arguments": {"y": [1, 2.5, True, "ü<"]}}},
            ],
        },
        {"role": "tool", "content": "first"},
        {"role": "tool", "content": "second"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
    ],
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a \"city\" <now>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1.0}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "zeit", "description": "Wie spät ist es?"}},
]

# What other models' templates use, one feature at a time.
SNIPPETS = {
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index > 4 %}{% break %}{% endif %}{{ m.role }}:{{ m['content'] }};{% endfor %}",
    "trimmed blocks": "  {% for m in messages %}\n    {% if m.role == 'user' %}\n  U {{ m.content }}\n    {% else %}\nA\n    {% endif %}\n{% endfor %}\n\nend\n",
    "string methods": "{% for m in messages %}{{ m.content.strip().upper() }}|{{ m.content.split('e')[-1] }}|{{ m.content.startswith('B') }}|{{ m.content.replace('.', '!') }}|{{ m.content.rstrip('.\n') }}|{{ m.content.lstrip() }}|{{ m.content.title() }}\n{% endfor %}",
    "dictionary methods": "{% for m in messages %}{{ m.get('content', '-') }}{{ m.get('name', 'nobody') }}{% for k, v in m.items() %}{{ k }}={{ v }},{% endfor %}{{ 'name' in m }}{{ m.name is defined }}\n{% endfor %}",
    "tojson": "{{ messages | tojson }}\n{{ messages | tojson(indent=4) }}\n{{ messages[0] | tojson(indent=2) }}{{ [] | tojson }}{{ {} | tojson(indent=2) }}{{ {'f': 1.0, 'g': 1e20, 'h': 0.00001, 's': 'ü\"\\\\\\n<'} | tojson }}{{ 'ü\\t👍' | tojson(ensure_ascii=true) }}{{ {'b': 1, 'a': [1, 2]} | tojson(separators=[',', ':'], sort_keys=true) }}",
    "namespace and slices": "{% set ns = namespace(n=0, last='') %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ messages[1:] | length }}{{ messages[-1].content }}{{ (messages | first).role }}{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "macros and filters": "{% macro show(m, sep=': ') -%}{{ m.role ~ sep ~ m.content | trim }}{%- endmacro %}{% for m in messages %}{{ show(m) }}{{ show(m, sep='=') | length }}{% endfor %}{{ bos_token }}{{ eos_token }}{{ none_such or 'none' }}{{ tools is none }}{{ not tools }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 1.5 }}{{ true }}",
    "generation blocks": "{% for m in messages %}{% if m.role == 'assistant' %}\n{% generation %}{{ m.content }}{% endgeneration %}\n{%- else -%}\n{{ m.content }}\n{%- endif -%}\n{% endfor %}",
    "variables of the request": "{{ enable_thinking }}{% if mode is defined and mode == 'x' %}X{% endif %}{% for f in flags or [] %}{{ f }},{% endfor %}{{ messages | length }}",
    "types": "{% for m in messages %}{{ m.content is string }}{{ m is mapping }}{{ m.content is iterable }}{{ m.tool_calls is defined and m.tool_calls }}{{ loop.first }}{{ loop.last }}{{ loop.previtem.role if loop.previtem is defined else '-' }}{% endfor %}",
}

REFUSALS = {
    "raises": ("{{ raise_exception('Roles must alternate: ' + messages[0].role) }}", "Roles must alternate: user"),
    "raises inside a macro": ("{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{% for m in messages %}{{ f() }}{% endfor %}", "no"),
}


def main():
    qwen3 = json.loads(pathlib.Path(sys.argv[1]).read_text())["chat_template"]
    fields = GGUFReader(sys.argv[2]).fields
    demo = fields["tokenizer.chat_template"].contents()
    templates = {"qwen3": qwen3, "smollm2": demo} | {f"snippet: {name}": source for name, source in SNIPPETS.items()}
    cases = []

    def case(template, name, messages, **kwargs):
        add_generation_prompt = kwargs.pop("add_generation_prompt")
        tools = kwargs.pop("tools", None)
        messages = json.loads(json.dumps(messages, sort_keys=True))
        rendered = _compile_jinja_template(templates[template]).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token="<s>",
            eos_token="</s>",
            **kwargs,
        )
        cases.append(
            {
                "template": template,
                "name": name,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
                "tools": tools,
                "kwargs": kwargs,
                "expected": rendered,
            }
        )

    for name, messages in (CHATS | TOOL_CHATS).items():
        for add_generation_prompt in (True, False):
            case("qwen3", name, messages, add_generation_prompt=add_generation_prompt)
        case("qwen3", name, messages, add_generation_prompt=True, enable_thinking=False)
        case("qwen3", name, messages, add_generation_prompt=True, enable_thinking=True)
    for name, messages in (CHATS | TOOL_CHATS).items():
        case("qwen3", f"{name}, tools", messages, add_generation_prompt=True, tools=TOOLS)
    for name, messages in CHATS.items():
        for add_generation_prompt in (True, False):
            case("smollm2", name, messages, add_generation_prompt=add_generation_prompt)
    for snippet in SNIPPETS:
        case(f"snippet: {snippet}", "several turns", CHATS["several turns"], add_generation_prompt=True, enable_thinking=False, mode="x", flags=["a", 1])

    out = {
        "templates": templates,
        "cases": cases,
        "refusals": [{"name": n, "template": t, "message": m} for n, (t, m) in REFUSALS.items()],
    }
    path = pathlib.Path(__file__).with_name("templates.json")
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
