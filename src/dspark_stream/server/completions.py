"""The older completions API: the chat API's chunks and bodies with texts in place of messages."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from dspark_stream.server import chat, wire
from dspark_stream.server.lifecycle import ResponseMachine


class TextChoice(msgspec.Struct, kw_only=True):
    """The one choice: the whole text, or what a chunk adds to it."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: str | None = None


class TextCompletion(msgspec.Struct, tag="text_completion", tag_field="object", kw_only=True):
    """A whole completion, or one event of a streamed one: both are called the same."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: chat.ChatUsage | UnsetType | None = UNSET
    dspark: wire.DsparkStats | UnsetType = UNSET
    metrics: chat.ChatMetrics | UnsetType = UNSET


def chunks(event: wire.ServerEvent, machine: ResponseMachine, gamma: int) -> list[TextCompletion]:
    """What a streaming client is told instead of ``event``; often nothing. There are no roles to begin with: the first
    chunk has text, and what was used is in the last."""
    if isinstance(event, wire.Created):
        return []
    found = [_of_chat(chunk) for chunk in chat.chunks(event, machine, gamma)]
    if found and isinstance(event, wire.TerminalEvent):
        found[-1].dspark = machine.used()
    return found


def completion(event: wire.TerminalEvent, machine: ResponseMachine, gamma: int) -> TextCompletion:
    """The one body of a completion that was not streamed."""
    return _of_chat(chat.completion(event, machine, gamma))


def _of_chat(said: chat.Chunk | chat.Completion) -> TextCompletion:
    return TextCompletion(
        id=said.id,
        created=said.created,
        model=said.model,
        choices=[_choice(choice) for choice in said.choices],
        system_fingerprint=said.system_fingerprint,
        usage=said.usage,
        dspark=said.dspark,
        metrics=said.metrics,
    )


def _choice(choice: chat.ChunkChoice | chat.Choice) -> TextChoice:
    text = choice.delta.content if isinstance(choice, chat.ChunkChoice) else choice.message.content
    return TextChoice(text=text or "", finish_reason=choice.finish_reason)
