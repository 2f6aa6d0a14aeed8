"""``dspark-stream generate``: one answer, with what every round did, for scripts and for people."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import InternalError
from dspark_stream.types import FinishReason, GenerationRequest, RoundRecord, TokensEvent, Usage


class Round(msgspec.Struct, frozen=True):
    """The part of a `RoundRecord` that is the same on every machine, timings left out."""

    start: int
    anchor: int
    draft_tokens: list[int]
    scheduled: int
    accepted: int
    bonus: int
    confidence: list[float]

    @classmethod
    def of(cls, record: RoundRecord) -> Round:
        """Take these fields from ``record``."""
        return cls(*(getattr(record, name) for name in cls.__struct_fields__))


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The object that ``--json`` prints."""

    output_ids: list[int]
    text: str
    finish_reason: FinishReason
    accepted_length: float | None
    """None where no round was run: the first token comes out of the prompt's own pass."""
    tokens_per_s: float | None
    """Tokens after the first over the time since the first; None where there was but one."""
    rounds: list[Round]
    usage: Usage


def generate(engine: LocalEngine, request: GenerationRequest, on_text: Callable[[str], None] | None = None) -> Answer:
    """Run ``request`` to its end; ``on_text`` gets the text as it comes.

    Raises:
        DsparkError: the engine refuses the request, or the stream failed.
    """
    ids: list[int] = []
    texts: list[str] = []
    rounds: list[Round] = []
    for event, _ in engine.run([request]):
        if isinstance(event, TokensEvent):
            ids += event.token_ids
            texts.append(event.text)
            if on_text is not None and event.text:
                on_text(event.text)
            if event.round is not None:
                rounds.append(Round.of(event.round))
            continue
        if event.reason == "failed":
            raise InternalError(event.error.message if event.error else "the stream failed")
        usage = event.usage
        timed = usage.output_tokens > 1 and usage.decode_ms > 0
        return Answer(
            output_ids=ids,
            text="".join(texts),
            finish_reason=event.reason,
            accepted_length=usage.accepted_length if usage.rounds else None,
            tokens_per_s=1000 * (usage.output_tokens - 1) / usage.decode_ms if timed else None,
            rounds=rounds,
            usage=usage,
        )
    raise InternalError("the stream ended without a word")
