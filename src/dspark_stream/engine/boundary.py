"""The engine's boundary: everything that the rest of the project may ask of it.

Submit, cancel, hold, release, close, and a callback with events. No tensor crosses. A thread implements it today
(`worker.py`); a process or a cluster actor can implement the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dspark_stream.types import EngineEvent, EngineSnapshot, GenerationRequest, Message, ModelInfo

EventSink = Callable[[Sequence[EngineEvent]], None]
"""Called on the engine's thread, once for each engine step, with the events of all streams, in order."""


class Engine(Protocol):
    """All methods but `close` return at once, and all may be called from any thread. Events arrive through the sink
    alone. An engine that fails for good ends every stream with an `EngineFailedError`; `snapshot` says why.
    """

    info: ModelInfo

    def start(self, sink: EventSink) -> None:
        """Begin work. Called once, after which events go to ``sink``."""

    def submit(self, request: GenerationRequest) -> None:
        """Queue a stream. It ends in exactly one `FinishedEvent`, whatever happens.

        Raises:
            InvalidRequestError: values out of range (``param`` says which); nothing was queued.
            ContextLengthError: prompt + max_tokens do not fit ``info.max_model_len``; nothing was queued.
            DrainingError: `close` was called; nothing was queued.
            EngineFailedError: the engine does no more work; nothing was queued.
        """

    def cancel(self, request_id: str) -> None:
        """End a stream within one round, with reason ``cancelled``. Unknown or ended ids are ignored."""

    def hold(self, request_id: str) -> None:
        """Take a stream out of the batch (its reader is slow); its cache stays. Idempotent."""

    def release(self, request_id: str) -> None:
        """Put a held stream back. Idempotent."""

    def snapshot(self) -> EngineSnapshot:
        """Gauges and counters now."""

    def close(self, timeout_s: float) -> None:
        """Refuse new work, let streams finish for ``timeout_s``, fail the rest with a `ShutdownError`, end (blocks)."""


class Tokenizer(Protocol):
    """Text in, tokens out. Calls may take long for long texts: run them off the event loop."""

    def encode_chat(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """Tokens of a conversation under the model's chat template, generation prompt added. Names of control tokens in
        what is said are plain text.

        ``most``: of more tokens than that the first ``most + 1`` are enough, and the rest of the text is not read.
        """

    def encode_prompt(self, text: str, most: int | None = None) -> list[int]:
        """Tokens of a text to go on with: the BOS token first where the model wants one, no template. ``most`` as
        above."""

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, special tokens not added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
