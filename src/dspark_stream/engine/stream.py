"""One stream's state inside the engine, from the queue to its terminal event."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from enum import Enum
from math import inf
from typing import NamedTuple

from dspark_stream.decoding.draft import acceptance_of
from dspark_stream.decoding.lookup import LONGEST, Found, Lookup
from dspark_stream.decoding.noise import NoiseCache
from dspark_stream.decoding.repeats import Repeats
from dspark_stream.engine.context import Backlog
from dspark_stream.engine.text import TextStream
from dspark_stream.load.acceptance import Past
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.cache import Extent
from dspark_stream.models.tokenizer import TokenBytes
from dspark_stream.types import (
    ErrorInfo,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    Piece,
    RoundRecord,
    SamplingParams,
    TokensEvent,
    Usage,
)


def round_key(request: GenerationRequest) -> int:
    """What rejection's uniforms are keyed by: 64 bits of the whole request, its seed included.

    Not the seed alone: two streams of one batch with the same seed at the same position would draw the same x_1, and
    the one's confidence, which knows its x_1, would decide about admitting the other's. Streams that are the same in
    everything draw the same and do no harm: ties are admitted by position first (decoding/schedule.py).
    """
    s = request.sampling
    what = (s.seed, s.temperature, s.top_p, s.top_k, s.min_p, request.prompt_ids, *adjustments_of(s))
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest())


def adjustments_of(s: SamplingParams) -> tuple[object, ...]:
    """What is asked for of logits beside how they are drawn from; empty: nothing."""
    asked = s.frequency_penalty, s.presence_penalty, s.repetition_penalty, s.logit_bias, s.min_tokens
    return () if asked == (0.0, 0.0, 1.0, (), 0) else (*asked, s.stop_token_ids if s.min_tokens else ())


class Phase(Enum):
    """Where a stream is; it only moves down this list."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


class Mark(NamedTuple):
    """How far a stream had come when something was begun: what `Stream.rewind` goes by."""

    phase: Phase
    output_tokens: int
    prefilled: int


class Stream:
    """Written by the engine thread alone. `position` and `anchor` are the algorithm's p and anchor token.

    Args:
        request: what was asked for.
        vocab: V.
        gamma: γ.
        stop_ids: tokens that end it.
        text: what tokens stand for; None for token ids only.
        eos_ids: the model's own stop tokens, which ``min_tokens`` holds off whether or not they end the stream.
        lookup: whether drafts may be looked up in its own prompt and text.
    """

    def __init__(
        self,
        request: GenerationRequest,
        vocab: int,
        gamma: int,
        stop_ids: frozenset[int],
        text: TokenBytes | None,
        eos_ids: Sequence[int] = (),
        lookup: bool = False,
    ) -> None:
        self.request = request
        self.sampling: SamplingParams = request.sampling
        self.acceptance = acceptance_of(request.sampling, request.verification)
        """What its sampling means for its drafts."""
        self.gamma = gamma if request.mode == "dspark" else 0
        """Draft tokens a round; 0 in plain mode."""
        self.round_key = round_key(request)
        self.noise = NoiseCache(request.sampling.seed, vocab)
        self.past = Past(self.gamma, self.acceptance) if self.gamma else None
        """What its drafts have been like; None in plain mode."""
        self.lookup = Lookup() if lookup and request.mode == "dspark" else None
        self.repeats = Repeats()
        """What its looked-up drafts have been worth."""
        self.backlog = Backlog()
        self.phase = Phase.WAITING
        self.held = False
        self.extent = Extent(0, 0)
        self.prefilled = 0
        """Prompt tokens whose keys and values are in the store."""
        self.position = len(request.prompt_ids) - 1
        self.anchor = request.prompt_ids[-1]
        self.output_tokens = 0
        self.max_chunk_gap_ms = request.max_chunk_gap_ms or inf
        """Bound on the time between two chunks; infinite where there is none."""
        self.last_chunk_s = time.perf_counter()
        """When its last tokens left; before that, when its prompt was through."""
        self.late_chunks = 0
        self._stop_ids, self._eos_ids, self._vocab = stop_ids, eos_ids, vocab
        self._adjustment: Adjustment | None = None
        self._text = TextStream(text, request.sampling.stop)
        self._rounds = 0
        self._drafted = 0
        self._scheduled = 0
        self._accepted = 0
        self._per_position = [0] * self.widest
        self.submitted_s = time.perf_counter()
        self._t_admit = self._t_first = self.submitted_s

    @property
    def drafts(self) -> bool:
        """Whether it takes part in drafting."""
        return self.gamma > 0

    @property
    def widest(self) -> int:
        """Draft tokens of a round at most, whoever proposes them."""
        return max(self.gamma, LONGEST if self.lookup is not None else 0)

    @property
    def adjustment(self) -> Adjustment | None:
        """What its logits are changed by; None: nothing, or nothing any more."""
        return self._adjustment if self._adjustment is not None and self._adjustment.active else None

    @property
    def slots_needed(self) -> int:
        """Token slots from the first prompt token to the last that a round could touch: a whole block past the end."""
        return len(self.request.prompt_ids) + self.sampling.max_tokens + self.gamma + 1

    def admitted(self, extent: Extent) -> None:
        """The stream has its slots and starts its prefill."""
        self.extent = extent
        self.phase = Phase.PREFILL
        self._t_admit = self._t_first = time.perf_counter()
        if adjustments_of(self.sampling):  # not sooner: it may have waited for long, and prompts are long
            stops = {*self._eos_ids, *self.sampling.stop_token_ids}
            self._adjustment = Adjustment(self.sampling, stops, self.request.prompt_ids, self._vocab)

    def mark(self) -> Mark:
        """For `rewind`, if what is begun now should fail."""
        return Mark(self.phase, self.output_tokens, self.prefilled)

    def rewind(self, mark: Mark) -> bool:
        """Undo what was begun at ``mark`` and failed, so that it can be done again; False where tokens were committed.

        Keys and values that it wrote need no undoing: they are written again before anything reads them.
        """
        if (self.phase, self.output_tokens) != mark[:2]:
            return False
        if self.lookup is not None and self.prefilled > mark.prefilled:  # its prompt is all that is in there yet
            self.lookup = Lookup()
            self.lookup.extend(self.request.prompt_ids[: mark.prefilled])
        self.prefilled = mark.prefilled
        self.backlog.cut(self.prefilled if self.phase is Phase.PREFILL else self.position)
        return True

    def read(self, count: int) -> None:
        """So many more prompt tokens are in the store."""
        if self.lookup is not None:
            self.lookup.extend(self.request.prompt_ids[self.prefilled : self.prefilled + count])
        self.prefilled += count

    def look_up(self) -> Found | None:
        """What its own text went on with before, no further than it may go itself; None: nothing."""
        left = self.sampling.max_tokens - self.output_tokens - 1  # what the bonus token leaves
        return self.lookup.find(left) if self.lookup is not None and left > 0 else None

    def started(self) -> None:
        """The whole prompt is in the store; rounds begin with the next token."""
        self.phase = Phase.DECODE
        self._t_first = self.last_chunk_s = time.perf_counter()

    def count_round(self, drafted: int, scheduled: int, accepted: int) -> None:
        """One verification round's figures, before any stop cut."""
        self._rounds += 1
        self._drafted += drafted
        self._scheduled += scheduled
        self._accepted += accepted
        for k in range(accepted):
            self._per_position[k] += 1

    def commit(
        self, tokens: list[int], accepted: int, record: RoundRecord | None = None
    ) -> tuple[TokensEvent, FinishReason | None]:
        """Take ``tokens`` (the first ``accepted`` were drafted) up to the first stop; position and anchor move on.

        Returns the event to send, and the reason to finish if there is one. Nothing after a stop token, a stop
        string or the last allowed token is kept.
        """
        kept: list[int] = []
        pieces: list[Piece] = []
        reason: FinishReason | None = None
        for i, token in enumerate(tokens):
            kept.append(token)
            self.output_tokens += 1
            late_enough = self.output_tokens > self.sampling.min_tokens
            if token in self._stop_ids and late_enough:
                reason = "stop"
                break
            new, stopped = self._text.push(token, i < accepted, late_enough)
            pieces += new
            if stopped:
                reason = "stop"
                break
            if self.output_tokens >= self.sampling.max_tokens:
                reason = "length"
                break
        now_s = time.perf_counter()
        self.late_chunks += 1e3 * (now_s - self.last_chunk_s) > self.max_chunk_gap_ms
        self.last_chunk_s = now_s
        self.position += len(kept)
        self.anchor = kept[-1]
        if self._adjustment is not None:
            self._adjustment.generated(kept)
        if self.lookup is not None:
            self.lookup.extend(kept)
        if reason:
            pieces += self._text.finish()
        return self._tokens_event(kept, pieces, record), reason

    def _tokens_event(self, tokens: list[int], pieces: list[Piece], record: RoundRecord | None) -> TokensEvent:
        merged: list[Piece] = []
        for piece in pieces:
            # who asks for rounds wants to see tokens; for everybody else neighbours of one origin are one piece
            if merged and merged[-1].drafted == piece.drafted and not self.request.record_rounds:
                merged[-1] = Piece(merged[-1].text + piece.text, piece.drafted)
            else:
                merged.append(piece)
        return TokensEvent(
            request_id=self.request.request_id,
            token_ids=tokens,
            text="".join(p.text for p in pieces),
            pieces=merged,
            round=record if self.request.record_rounds else None,
        )

    def rest_of_text(self) -> TokensEvent | None:
        """Text still held back when a stream ends early; None where there is none."""
        pieces = self._text.finish()
        return self._tokens_event([], pieces, None) if pieces else None

    def finished(self, reason: FinishReason, error: ErrorInfo | None = None) -> FinishedEvent:
        """The terminal event; the stream is done."""
        self.phase = Phase.DONE
        now = time.perf_counter()
        usage = Usage(
            input_tokens=len(self.request.prompt_ids),
            output_tokens=self.output_tokens,
            rounds=self._rounds,
            drafted=self._drafted,
            scheduled=self._scheduled,
            accepted=self._accepted,
            accepted_per_position=self._per_position,
            queue_ms=(self._t_admit - self.submitted_s) * 1e3,
            prefill_ms=(self._t_first - self._t_admit) * 1e3,
            decode_ms=(now - self._t_first) * 1e3,
        )
        return FinishedEvent(request_id=self.request.request_id, reason=reason, usage=usage, error=error)
