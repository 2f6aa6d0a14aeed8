"""Recommended sampling: taken by every way in for what a request leaves open, and never over what it says."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_stream.types import RecommendedSampling, SamplingParams
from fakes import FakeEngine, model_info
from wire.harness import Launch, Running

QWEN = RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
WAYS = ("chat", "responses", "socket")


async def asked(running: Running, way: str, **fields: Any) -> SamplingParams:
    """What the engine is given for a request with these fields."""
    if way != "chat" and "top_k" in fields:
        fields["dspark"] = {"top_k": fields.pop("top_k")}
    if way == "socket":
        async with running.socket() as socket:
            await socket.create(**fields)
            await socket.response()
    else:
        path, body = ("/v1/chat/completions", CHAT) if way == "chat" else ("/v1/responses", {"input": "hello"})
        async with running.http() as http, http.post(path, json=body | fields) as answer:
            assert answer.status == 200, await answer.text()
    return running.engine.submitted[-1].sampling


def chosen(sampling: SamplingParams) -> tuple[float, float, int]:
    return sampling.temperature, sampling.top_p, sampling.top_k


async def started(launch: Launch, sampling: RecommendedSampling) -> Running:
    return await launch(FakeEngine(info=model_info(sampling=sampling)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.7, 0.8, 20)),
        ({"temperature": None, "top_p": None}, (0.7, 0.8, 20)),
        ({"temperature": 0}, (0.0, 0.8, 20)),
        ({"temperature": 1.5}, (1.5, 0.8, 20)),
        ({"top_p": 1}, (0.7, 1.0, 20)),
        ({"top_k": 0}, (0.7, 0.8, 0)),
        ({"temperature": 1, "top_p": 0.5, "top_k": 3}, (1.0, 0.5, 3)),
    ],
    ids=str,
)
async def test_a_field_that_is_left_out_is_the_recommended_one(
    launch: Launch, way: str, fields: dict[str, Any], expected: tuple[float, float, int]
) -> None:
    running = await started(launch, QWEN)
    assert chosen(await asked(running, way, **fields)) == expected


@pytest.mark.parametrize("way", WAYS)
async def test_where_nothing_is_recommended_temperature_is_1(running: Running, way: str) -> None:
    assert chosen(await asked(running, way)) == (1.0, 1.0, 0)


async def test_a_recommendation_of_some_fields_and_a_greedy_one(launch: Launch) -> None:
    """Guards against a recommended 0 that counts as none."""
    running = await started(launch, RecommendedSampling(temperature=0.0))
    assert chosen(await asked(running, "socket")) == (0.0, 1.0, 0)
    running = await started(launch, RecommendedSampling(top_k=10**9))
    assert chosen(await asked(running, "socket")) == (1.0, 1.0, 1000)  # the vocabulary, past which it changes nothing


async def test_a_response_says_how_it_was_sampled(launch: Launch) -> None:
    running = await started(launch, QWEN)
    async with running.http() as http, http.post("/v1/responses", json={"input": "x", "top_p": 0.9}) as answer:
        body = await answer.json()
    assert (body["temperature"], body["top_p"]) == (0.7, 0.9)


async def test_clients_are_told_what_is_recommended(launch: Launch, running: Running) -> None:
    for server, expected in (
        (await started(launch, QWEN), {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
        (running, {"temperature": None, "top_p": None, "top_k": None}),
    ):
        async with server.socket() as socket:
            assert socket.hello["sampling"] == expected
        async with server.http() as http, http.get("/props") as answer:
            assert (await answer.json())["model"]["sampling"] == expected
