"""The ``openai`` package against a real model. Prints one JSON object with what it saw."""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

MODEL = "smollm2-135m"
URL = sys.argv[1] + "/v1"
API = OpenAI(base_url=URL, api_key="unused", max_retries=0, timeout=120)
STORY: Any = [{"role": "user", "content": "Tell me a story about a fox."}]


def chat() -> Any:
    """One body, a stream, and a history as another provider writes it."""
    whole = API.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=12, seed=7, logit_bias={"0": -100}, frequency_penalty=0.1
    )
    history: Any = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "hello", "reasoning_content": "a greeting", "tool_calls": []},
        {"role": "user", "content": "What did I say? <|im_end|>"},
    ]
    texts, last = [], None
    for chunk in API.chat.completions.create(
        model=MODEL,
        messages=history,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "min_tokens": 8},
    ):
        texts += [choice.delta.content or "" for choice in chunk.choices]
        last = chunk
    assert last is not None
    extra: Any = whole.model_extra
    return {
        "text": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens if whole.usage else None,
        "dspark": {name: extra["dspark"][name] for name in ("seed", "verification")},
        "fingerprint": whole.system_fingerprint,
        "streamed": "".join(texts),
        "streamed_tokens": last.usage.completion_tokens if last.usage else None,
    }


def completions() -> Any:
    """The older API."""
    answer = API.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5)
    return {"text": answer.choices[0].text, "tokens": answer.usage.completion_tokens if answer.usage else None}


def responses() -> Any:
    """Two turns, and an overflow."""
    first = API.responses.create(model=MODEL, input="My name is Zed.", max_output_tokens=8)
    second = API.responses.create(
        model=MODEL, input="What is my name?", previous_response_id=first.id, max_output_tokens=8
    )
    found: dict[str, Any] = {"first": first.output_text, "second": second.output_text}
    try:
        API.responses.create(model=MODEL, input="a " * 9000)
    except openai.BadRequestError as error:
        found["overflow"] = [error.code, error.message]
    return found


def seeds() -> Any:
    """The same seed and request eight times at once, and once alone."""

    def one(_: int) -> str | None:
        answer = API.chat.completions.create(model=MODEL, messages=STORY, max_tokens=40, temperature=1, seed=42)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(8)))
    return {"texts": len({*texts, one(0)})}


def websocket() -> Any:
    """``responses.connect``: a warm-up, then turns that nothing stores."""
    return asyncio.run(_websocket())


async def _websocket() -> Any:
    api = AsyncOpenAI(base_url=URL, api_key="unused", max_retries=0)
    found: dict[str, Any] = {"types": [], "texts": []}
    async with api.responses.connect() as connection:

        async def end() -> Any:
            async for event in connection:
                found["types"].append(event.type)
                if event.type in ("response.completed", "response.incomplete"):
                    return event.response
                assert event.type not in ("error", "response.failed"), event
            raise AssertionError("the socket closed")

        await connection.send(
            {"type": "response.create", "model": MODEL, "generate": False, "store": False, "input": []}
        )
        previous = await end()
        found["warm"] = previous.output
        for text in ("My name is Zed.", "What is my name?"):
            await connection.response.create(
                model=MODEL, input=text, store=False, previous_response_id=previous.id, max_output_tokens=10
            )
            previous = await end()
            found["texts"].append(previous.output_text)
    return found


if __name__ == "__main__":
    print(json.dumps({check.__name__: check() for check in (chat, completions, responses, seeds, websocket)}))
