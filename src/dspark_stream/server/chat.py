"""The chat completions API as another way of writing down the same response events."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from dspark_stream.server import wire
from dspark_stream.server.lifecycle import ResponseMachine
from dspark_stream.types import Usage


class ChatUsage(msgspec.Struct, kw_only=True):
    """Tokens in the chat API's words."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SpeculativeDecoding(msgspec.Struct, kw_only=True):
    """How speculation went, with vLLM's names; ``num_scheduled_tokens`` is ours."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    """How many rounds accepted 0, 1, 2, … draft tokens."""
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_scheduled_tokens: int
    num_spec_tokens: int
    """Draft block size."""


class ChatMetrics(msgspec.Struct, kw_only=True):
    """The ``metrics`` object."""

    speculative_decoding: SpeculativeDecoding


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    """The one choice of a chunk."""

    delta: Delta
    index: int = 0
    logprobs: None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct, tag="chat.completion.chunk", tag_field="object", kw_only=True):
    """One event of a streamed completion."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: ChatUsage | UnsetType | None = UNSET
    dspark: wire.DsparkStats | UnsetType = UNSET
    metrics: ChatMetrics | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(msgspec.Struct, kw_only=True):
    """The one choice of a completion."""

    message: AssistantMessage
    finish_reason: str
    index: int = 0
    logprobs: None = None


class Completion(msgspec.Struct, tag="chat.completion", tag_field="object", kw_only=True):
    """A whole completion in one body."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    system_fingerprint: str
    usage: ChatUsage
    dspark: wire.DsparkStats
    metrics: ChatMetrics


def chunks(event: wire.ServerEvent, machine: ResponseMachine, gamma: int) -> list[Chunk]:
    """What a streaming chat client is told instead of ``event``; often nothing."""
    plan = machine.plan
    match event:
        case wire.Created():
            first = _chunk(machine, [ChunkChoice(delta=Delta(role="assistant", content=""))])
            first.dspark = machine.used()
            if plan.continuous_usage:
                first.usage = chat_usage(machine.input_tokens, 0)
            return [first]
        case wire.TextDelta(delta=text, usage=usage):
            chunk = _chunk(machine, [ChunkChoice(delta=Delta(content=text))])
            if usage is not UNSET:
                chunk.usage = chat_usage(usage.input_tokens, usage.output_tokens)
            return [chunk]
        case wire.Completed() | wire.Incomplete():
            last = _chunk(machine, [ChunkChoice(delta=Delta(), finish_reason=finish_reason(event))])
            ended = machine.usage
            if ended is None:
                return [last]
            if plan.continuous_usage:
                last.usage = chat_usage(ended.input_tokens, ended.output_tokens)
            if not plan.include_usage:
                last.metrics = metrics(ended, gamma)
                return [last]
            final = _chunk(machine, [])
            final.usage = chat_usage(ended.input_tokens, ended.output_tokens)
            final.metrics = metrics(ended, gamma)
            return [last, final]
        case _:
            return []


def completion(event: wire.TerminalEvent, machine: ResponseMachine, gamma: int) -> Completion:
    """The one body of a completion that was not streamed."""
    usage = machine.usage
    assert usage is not None  # a terminal event of the engine has it
    message = AssistantMessage(content=machine.text)
    return Completion(
        id=machine.response_id,
        created=int(event.response.created_at),
        model=machine.plan.model,
        choices=[Choice(message=message, finish_reason=finish_reason(event))],
        system_fingerprint=machine.plan.fingerprint,
        usage=chat_usage(usage.input_tokens, usage.output_tokens),
        dspark=machine.used(),
        metrics=metrics(usage, gamma),
    )


def finish_reason(event: wire.TerminalEvent) -> str:
    """``length`` where the limit cut the answer, else ``stop``. Answers that were cut otherwise are errors here."""
    return "length" if isinstance(event, wire.Incomplete) else "stop"


def _chunk(machine: ResponseMachine, choices: list[ChunkChoice]) -> Chunk:
    plan = machine.plan
    usage: Any = None if plan.include_usage else UNSET
    return Chunk(
        id=machine.response_id,
        created=int(machine.created_at),
        model=plan.model,
        choices=choices,
        system_fingerprint=plan.fingerprint,
        usage=usage,
    )


def chat_usage(input_tokens: int, output_tokens: int) -> ChatUsage:
    """Tokens in the chat API's words."""
    return ChatUsage(
        prompt_tokens=input_tokens, completion_tokens=output_tokens, total_tokens=input_tokens + output_tokens
    )


def metrics(usage: Usage, gamma: int) -> ChatMetrics:
    """Figures of a finished answer with vLLM's names."""
    # Rounds that accepted at least k, for k = 0, 1, …; a difference of neighbours is "exactly k".
    at_least = [usage.rounds, *usage.accepted_per_position, 0]
    return ChatMetrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=usage.accepted_length,
            draft_acceptance_rate=usage.accepted / usage.drafted if usage.drafted else 0.0,
            acceptance_histogram=[a - b for a, b in pairwise(at_least)],
            num_spec_steps=usage.rounds,
            num_accepted_draft_tokens=usage.accepted,
            num_draft_tokens=usage.drafted,
            num_scheduled_tokens=usage.scheduled,
            num_spec_tokens=gamma,
        )
    )
