"""One answer from the stock OpenAI client. `pip install openai`, then `make run` in another terminal."""

import os

from openai import OpenAI

key = os.environ.get("ENGINE_API_KEY", "").split(",")[0] or "none"
client = OpenAI(base_url=os.environ.get("ENGINE_URL", "http://127.0.0.1:8000") + "/v1", api_key=key)
model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model,
    messages=[
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "What is a prime number?"},
    ],
    max_tokens=60,
    temperature=0,
)
print(answer.choices[0].message.content)
print(answer.usage)
