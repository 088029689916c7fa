"""A model that calls functions, with the stock OpenAI client. `pip install openai`, then in another terminal a model
that has been taught to: `engine --model Qwen/Qwen3-0.6B`."""

import json
import os
import sys

from openai import BadRequestError, OpenAI

key = os.environ.get("ENGINE_API_KEY", "").split(",")[0] or "none"
client = OpenAI(base_url=os.environ.get("ENGINE_URL", "http://127.0.0.1:8000") + "/v1", api_key=key)
model = client.models.list().data[0].id


def weather(city: str) -> str:
    return {"Paris": "rain, 12 degrees", "Rome": "sun, 24 degrees"}.get(city, "nobody knows")


city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tool = {"name": "weather", "description": "The weather of a city, now.", "parameters": city}
messages = [{"role": "user", "content": "Is it warmer in Paris or in Rome?"}]
for _ in range(5):
    try:
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=[{"type": "function", "function": tool}], max_tokens=1000
        )
    except BadRequestError as error:
        if error.param != "tools":
            raise
        sys.exit(f"{error.body['message']}. `engine --model Qwen/Qwen3-0.6B` serves a model that calls functions.")
    message = answer.choices[0].message
    print("thoughts:", getattr(message, "reasoning_content", None))
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        print("call:", call.function.name, call.function.arguments)
        try:
            result = weather(**json.loads(call.function.arguments))
        except (TypeError, ValueError) as error:
            # The model is told, as anybody would be.
            result = f"that was no call of {tool['name']}: {error}"
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print("answer:", message.content)
