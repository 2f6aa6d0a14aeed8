"""The ``openai`` package as a client. Run by `test_wire_openai` in an environment of its own.

Usage: openai_client.py BASE_URL CHECK [API_KEY]. Prints one JSON object with what the client saw.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI


def client(base_url: str, key: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=20)


def sse(base_url: str, key: str) -> Any:
    """Responses over server-sent events, through the helper that checks and gathers them."""
    seen, texts = [], []
    with client(base_url, key).responses.stream(model="fake-135m", input="hello", instructions="be brief") as stream:
        for event in stream:
            seen.append(event.type)
            if event.type == "response.output_text.delta":
                texts.append(event.delta)
        final = stream.get_final_response()
    return {
        "types": seen,
        "text": "".join(texts),
        "output_text": final.output_text,
        "status": final.status,
        "usage": final.usage.total_tokens if final.usage else None,
    }


def raw_sse(base_url: str, key: str) -> Any:
    """The same without the helper, every event validated against the package's own types."""
    numbers = []
    for event in client(base_url, key).responses.create(model="fake-135m", input="hello", stream=True):
        type(event).model_validate(event.model_dump())
        numbers.append(event.sequence_number)
    return {"numbers": numbers}


def body(base_url: str, key: str) -> Any:
    """One body, and a second turn."""
    api = client(base_url, key)
    first = api.responses.create(model="fake-135m", input="hello")
    type(first).model_validate(first.model_dump())
    second = api.responses.create(
        model="fake-135m",
        input=[{"role": "user", "content": "more"}],
        previous_response_id=first.id,
        max_output_tokens=2,
    )
    return {
        "text": first.output_text,
        "second": second.status,
        "reason": second.incomplete_details.reason if second.incomplete_details else None,
    }


def chat(base_url: str, key: str) -> Any:
    """Chat completions, streamed and not."""
    api = client(base_url, key)
    messages: Any = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    whole = api.chat.completions.create(model="fake-135m", messages=messages, seed=1)
    type(whole).model_validate(whole.model_dump())
    texts, usage, metrics, reason = [], None, None, None
    for chunk in api.chat.completions.create(
        model="fake-135m", messages=messages, stream=True, stream_options={"include_usage": True}
    ):
        type(chunk).model_validate(chunk.model_dump())
        for choice in chunk.choices:
            texts.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
        metrics = (chunk.model_extra or {}).get("metrics", metrics)
    return {
        "whole": whole.choices[0].message.content,
        "text": "".join(texts),
        "reason": reason,
        "completion_tokens": usage.completion_tokens if usage else None,
        "rounds": metrics["speculative_decoding"]["num_spec_steps"] if metrics else None,
    }


def errors(base_url: str, key: str) -> Any:
    """Refusals become the package's own exceptions."""
    api = client(base_url, key)
    found: dict[str, Any] = {}
    for name, kwargs in {
        "field": {"model": "fake-135m", "input": "x", "temperature": 9},
        "model": {"model": "nope", "input": "x"},
    }.items():
        try:
            api.responses.create(**kwargs)  # type: ignore[call-overload]
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.status_code, error.param, error.code]
    try:
        client(base_url, "wrong").responses.create(model="fake-135m", input="x")
    except openai.APIStatusError as error:
        found["key"] = [type(error).__name__, error.status_code, error.param, error.code]
    found["models"] = [model.id for model in api.models.list()]
    found["model_object"] = api.models.retrieve("fake-135m").owned_by
    return found


def websocket(base_url: str, key: str) -> Any:
    """``client.responses.connect``: lanes, an error, a second turn, each event in the package's types."""
    return asyncio.run(_websocket(base_url, key))


async def _websocket(base_url: str, key: str) -> Any:
    api = AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0)
    found: dict[str, Any] = {"types": [], "texts": {"a": "", "b": ""}, "ended": {}, "hello": None}
    async with api.responses.connect() as connection:
        found["hello"] = (await connection.recv()).type
        for lane in ("a", "b"):
            await connection.send(
                {"type": "response.create", "model": "fake-135m", "input": "hello", "stream_id": lane}
            )
        while len(found["ended"]) < 2:
            event: Any = await connection.recv()
            type(event).model_validate(event.model_dump())
            found["types"].append(event.type)
            if event.type == "response.output_text.delta":
                found["texts"][event.stream_id] += event.delta
            elif event.type == "response.completed":
                found["ended"][event.stream_id] = event.response.id
        await connection.response.create(model="fake-135m", input="x", temperature=-1)
        refused: Any = await connection.recv()
        found["error"] = [refused.type, refused.status, refused.error.param]
        await connection.response.create(model="fake-135m", input="more", previous_response_id=found["ended"]["a"])
        async for event in connection:
            if event.type == "response.completed":
                found["second"] = event.response.output_text
                break
    return found


CHECKS = {check.__name__: check for check in (sse, raw_sse, body, chat, errors, websocket)}

if __name__ == "__main__":
    print(json.dumps(CHECKS[sys.argv[2]](sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else "unused")))
