"""Several answers at once, each printed as its tokens arrive. `pip install openai`, then `make run` in another terminal."""

import asyncio
import os

from openai import AsyncOpenAI

key = os.environ.get("ENGINE_API_KEY", "").split(",")[0] or "none"
client = AsyncOpenAI(base_url=os.environ.get("ENGINE_URL", "http://127.0.0.1:8000") + "/v1", api_key=key)


async def ask(model: str, question: str) -> None:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(f"[{question}] {chunk.choices[0].delta.content!r}")


async def main() -> None:
    model = (await client.models.list()).data[0].id
    await asyncio.gather(*(ask(model, q) for q in ("What is snow?", "Name a fruit.", "What is 3 + 4?")))


asyncio.run(main())
