"""The stock OpenAI client against a running engine: what it sends is understood, what it gets it can read.

Usage: test_client.py ENGINE MODEL (run.sh does that)
"""

import os
import re
import subprocess
import sys
import tempfile
import unittest
from typing import Literal

import openai
import pydantic

KEY = "sk-test"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


# Of a model that has been taught to call functions and to think, as the demo model has not.
TEMPLATE = """{% if tools %}<tool_call> {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}
{% endfor %}{% endfor %}assistant:{% if thinks %}<think>{% endif %}"""


def start(*flags):
    command = [ENGINE, "--model", MODEL, "--served-model-name", "demo"]
    command += ["--port", "0", "--standalone", "--max-model-len", "1024", *flags]
    environment = dict(os.environ, ENGINE_API_KEY=KEY)
    for name in ["ETCD_ENDPOINTS", "NATS_SERVER"]:
        environment.pop(name, None)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    found = re.search(r"http://\S+", line)
    if not found:
        raise RuntimeError(f"the engine did not start: {line!r}, exit status {server.wait()}")
    return server, openai.OpenAI(base_url=found.group() + "/v1", api_key=KEY, max_retries=0)


def stop(server, client):
    client.close()
    server.terminate()
    status = server.wait(timeout=60)
    server.stdout.close()
    assert status == 0, f"the engine left with status {status}"


def setUpModule():
    global server, client, base_url
    server, client = start()
    base_url = client.base_url


def tearDownModule():
    stop(server, client)


class Models(unittest.TestCase):
    def test_the_model_is_listed(self):
        self.assertEqual([model.id for model in client.models.list()], ["demo"])
        self.assertEqual(client.models.retrieve("demo").id, "demo")


class Chat(unittest.TestCase):
    def test_a_question_is_answered(self):
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=32)
        self.assertGreater(len(answer.choices[0].message.content), 10)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn(answer.choices[0].finish_reason, ["stop", "length"])
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertGreaterEqual(usage.prompt_tokens_details.cached_tokens, 0)

    def test_a_limit_beyond_the_context_is_what_is_left_of_it(self):
        arguments = dict(model="demo", messages=QUESTION, temperature=0, max_tokens=64_000)
        answer = client.chat.completions.create(**arguments, extra_body={"ignore_eos": True})
        self.assertEqual((answer.choices[0].finish_reason, answer.usage.total_tokens), ("length", 1024))

    def test_an_answer_can_be_sent_back(self):
        first = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=32)
        messages = QUESTION + [first.choices[0].message.model_dump(), {"role": "user", "content": "And of Spain?"}]
        second = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=32)
        self.assertGreater(second.usage.prompt_tokens, first.usage.total_tokens)
        self.assertGreater(second.usage.prompt_tokens_details.cached_tokens, 0)

    def test_an_answer_of_the_clients_own_types_can_be_sent_back(self):
        class City(pydantic.BaseModel):
            capital: bool

        arguments = dict(model="demo", messages=QUESTION, temperature=0, max_tokens=32)
        parsed = client.chat.completions.parse(**arguments | {"max_tokens": 200}, response_format=City)
        free = client.chat.completions.create(**arguments).choices[0].message.content
        # It takes nothing but an answer that ended by itself.
        with client.chat.completions.stream(**arguments, stop=[free[12:15]]) as stream:
            streamed = stream.get_final_completion()
        for completion in [parsed, streamed]:
            message = completion.choices[0].message
            plain = {"role": "assistant", "content": message.content}
            ends = []
            for answer in [plain, message, message.model_dump()]:
                messages = QUESTION + [answer, {"role": "user", "content": "And of Spain?"}]
                ends.append(client.chat.completions.create(**arguments | {"messages": messages}).usage.prompt_tokens)
            self.assertEqual(ends, ends[:1] * 3)

    def test_a_stream_says_the_same(self):
        arguments = dict(model="demo", messages=QUESTION, temperature=0, max_completion_tokens=32)
        whole = client.chat.completions.create(**arguments)
        chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual(chunks[-2].choices[0].finish_reason, whole.choices[0].finish_reason)
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)

    def test_the_clients_own_accumulator_reads_a_stream(self):
        arguments = dict(model="demo", messages=QUESTION, temperature=0, max_tokens=32)
        free = client.chat.completions.create(**arguments).choices[0].message.content
        # It takes nothing but an answer that ended by itself.
        arguments["stop"] = [free[12:15]]
        with client.chat.completions.stream(**arguments) as stream:
            for _ in stream:
                pass
            completion = stream.get_final_completion()
        self.assertEqual(completion.choices[0].message.content, free.split(free[12:15])[0])

    def test_log_probabilities(self):
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=4
        )
        content = answer.choices[0].logprobs.content
        self.assertEqual(len(content), answer.usage.completion_tokens)
        text = b"".join(bytes(token.bytes) for token in content).decode()
        self.assertTrue(text.startswith(answer.choices[0].message.content))
        for token in content:
            self.assertEqual(len(token.top_logprobs), 4)
            self.assertEqual(token.top_logprobs[0].token, token.token)
            self.assertLessEqual(token.logprob, 0)

    def test_several_choices(self):
        arguments = dict(model="demo", messages=QUESTION, temperature=1, seed=5, max_tokens=16, n=3)
        answer = client.chat.completions.create(**arguments)
        texts = [choice.message.content for choice in answer.choices]
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        self.assertGreater(len(set(texts)), 1)
        streamed = ["", "", ""]
        for chunk in client.chat.completions.create(**arguments, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        self.assertEqual(streamed, texts)

    def test_stop(self):
        arguments = dict(model="demo", messages=QUESTION, temperature=0, max_tokens=32)
        free = client.chat.completions.create(**arguments).choices[0].message.content
        stop = free[9:13]
        answer = client.chat.completions.create(**arguments, stop=[stop, "never to be seen"])
        self.assertEqual(answer.choices[0].message.content, free.split(stop)[0])
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_an_answer_is_an_object_of_the_class_that_was_asked_for(self):
        class City(pydantic.BaseModel):
            name: str = pydantic.Field(max_length=20)
            capital: bool
            rivers: list[Literal["Seine", "Thames", "Rhine"]] = pydantic.Field(max_length=2)

        for arguments in [dict(temperature=0), dict(temperature=1, seed=1), dict(temperature=1, seed=2)]:
            answer = client.chat.completions.parse(
                model="demo", messages=QUESTION, max_tokens=200, response_format=City, **arguments
            )
            self.assertIsInstance(answer.choices[0].message.parsed, City)
            self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_vllms_structured_outputs_pass_as_extra_body(self):
        extra = {"structured_outputs": {"choice": ["Paris", "London"]}}
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, extra_body=extra)
        self.assertIn(answer.choices[0].message.content, ["Paris", "London"])
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_vllms_parameters_pass_as_extra_body(self):
        extra = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "min_tokens": 4}
        answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=8, seed=1, extra_body=extra)
        self.assertEqual(answer.usage.completion_tokens, 8)
        greedy = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        self.assertEqual(answer.choices[0].message.content, greedy.choices[0].message.content)


class Completions(unittest.TestCase):
    def test_the_model_knows_its_geography(self):
        answer = client.completions.create(model="demo", prompt="The capital of France is", temperature=0, max_tokens=2)
        self.assertEqual(answer.choices[0].text, " Paris.")

    def test_every_form_of_prompt(self):
        for prompt in ["Hello", ["Hello", "Bye"], [19556, 28], [[19556], [28, 32]]]:
            with self.subTest(prompt=prompt):
                answer = client.completions.create(model="demo", prompt=prompt, max_tokens=3, temperature=0)
                nested = isinstance(prompt, list) and not isinstance(prompt[0], int)
                self.assertEqual(len(answer.choices), len(prompt) if nested else 1)

    def test_a_stream_says_the_same(self):
        arguments = dict(model="demo", prompt="Once upon a time", temperature=0, max_tokens=16)
        whole = client.completions.create(**arguments)
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**arguments, stream=True))
        self.assertEqual(streamed, whole.choices[0].text)

    def test_log_probabilities_and_echo(self):
        answer = client.completions.create(
            model="demo", prompt="The sky is", temperature=0, max_tokens=4, logprobs=2, echo=True
        )
        logprobs = answer.choices[0].logprobs
        self.assertEqual("".join(logprobs.tokens), answer.choices[0].text)
        self.assertIsNone(logprobs.token_logprobs[0])
        self.assertEqual(logprobs.text_offset[0], 0)
        self.assertTrue(all(len(top) >= 2 for top in logprobs.top_logprobs[1:]))


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


class Functions(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
            template.write(TEMPLATE)
            template.flush()
            cls.server, cls.client = start("--chat-template", template.name)
        cls.tools = [openai.pydantic_function_tool(Weather)]
        cls.arguments = dict(model="demo", messages=QUESTION, tools=cls.tools, tool_choice="required", max_tokens=150)
        cls.arguments |= dict(parallel_tool_calls=False, temperature=0)
        # Once it thought, the demo model would find no end.
        cls.arguments |= dict(extra_body={"include_reasoning": False})

    @classmethod
    def tearDownClass(cls):
        stop(cls.server, cls.client)

    def test_a_call_is_made_and_its_result_sent_back(self):
        answer = self.client.chat.completions.parse(**self.arguments)
        self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
        message = answer.choices[0].message
        self.assertIsNone(message.content)
        [call] = message.tool_calls
        self.assertIsInstance(call.function.parsed_arguments, Weather)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        messages = QUESTION + [message, result]
        answer = self.client.chat.completions.create(
            model="demo", messages=messages, tools=self.tools, temperature=0, max_tokens=8
        )
        self.assertTrue(answer.choices[0].message.content)

    def test_a_streamed_call_is_put_together(self):
        whole = self.client.chat.completions.create(**self.arguments).choices[0].message.tool_calls[0].function
        with self.client.chat.completions.stream(**self.arguments) as stream:
            events = [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
        self.assertIn("tool_calls.function.arguments.done", events)
        self.assertEqual(final.finish_reason, "tool_calls")
        function = final.message.tool_calls[0].function
        self.assertEqual((function.name, function.arguments), (whole.name, whole.arguments))
        self.assertIsInstance(function.parsed_arguments, Weather)

    def test_thoughts_have_a_field_of_their_own(self):
        arguments = dict(model="demo", messages=QUESTION, temperature=0, max_tokens=8)
        arguments |= dict(extra_body={"chat_template_kwargs": {"thinks": True}})
        message = self.client.chat.completions.create(**arguments).choices[0].message
        self.assertIsNone(message.content)
        chunks = list(self.client.chat.completions.create(**arguments, stream=True))
        thoughts = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks]
        self.assertEqual("".join(thoughts), message.reasoning_content)
        self.assertTrue(message.reasoning_content)
        self.assertEqual(message.reasoning, message.reasoning_content)


class Errors(unittest.TestCase):
    def refused(self, kind, param=None, **arguments):
        arguments = dict(model="demo", messages=QUESTION) | arguments
        with self.assertRaises(kind) as caught:
            client.chat.completions.create(**arguments)
        if param:
            self.assertEqual(caught.exception.param, param)
            self.assertIn(param, str(caught.exception))
        return caught.exception

    def test_bad_values(self):
        self.refused(openai.BadRequestError, "temperature", temperature=-1)
        self.refused(openai.BadRequestError, "top_p", top_p=1.5)
        self.refused(openai.BadRequestError, "n", n=0)
        self.refused(openai.BadRequestError, "messages", messages=[])
        self.refused(openai.BadRequestError, "messages[0].role", messages=[{"role": "wizard", "content": "Hi"}])
        self.refused(openai.BadRequestError, "nonsense", extra_body={"nonsense": 1})

    def test_what_is_not_supported(self):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        self.refused(openai.BadRequestError, "tools", tools=[tool])
        self.refused(openai.BadRequestError, "response_format", response_format={"type": "structural_tag"})

    def test_an_error_before_a_stream(self):
        self.refused(openai.BadRequestError, "temperature", temperature=-1, stream=True)

    def test_a_prompt_beyond_the_context(self):
        messages = [{"role": "user", "content": "word " * 50_000}]
        error = self.refused(openai.BadRequestError, "messages", messages=messages)
        self.assertEqual(error.code, "context_length_exceeded")

    def test_an_unknown_model(self):
        self.assertEqual(self.refused(openai.NotFoundError, model="gpt-4").code, "model_not_found")

    def test_a_wrong_key(self):
        stranger = openai.OpenAI(base_url=base_url, api_key="sk-wrong", max_retries=0)
        with self.assertRaises(openai.AuthenticationError):
            stranger.models.list()
        stranger.close()


class Asynchronous(unittest.IsolatedAsyncioTestCase):
    async def test_many_streams_at_a_time(self):
        import asyncio

        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0) as many:

            async def ask(number):
                messages = [{"role": "user", "content": f"Tell me about the number {number}."}]
                stream = await many.chat.completions.create(
                    model="demo", messages=messages, temperature=0, max_tokens=12, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            together = await asyncio.gather(*(ask(number) for number in range(8)))
            alone = [await ask(number) for number in range(8)]
        self.assertEqual(together, alone)


if __name__ == "__main__":
    ENGINE, MODEL = sys.argv[1:3]
    unittest.main(argv=sys.argv[:1], verbosity=2)
