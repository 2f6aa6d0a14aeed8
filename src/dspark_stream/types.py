"""Records shared between rooms. Leaves: nothing here imports the project.

No tensor appears in this file: these records cross the engine's boundary, and one day a process.
"""

from __future__ import annotations

from math import inf
from typing import Literal, NamedTuple

import msgspec

Mode = Literal["dspark", "plain"]
Verification = Literal["rejection", "coupled"]
Acceptance = Literal["greedy", "rejection", "coupled"]
"""How a stream's drafts are accepted: at temperature 0 both verifications are one comparison."""
Source = Literal["model", "lookup"]
"""Where drafts come from: the drafter, or what a stream's own text went on with before."""
FinishReason = Literal["stop", "length", "cancelled", "failed"]

Text = str | tuple[str, ...]
"""What one message says: one text, or the two or more parts that it came in."""
Message = tuple[str, Text]
"""(role, what is said)."""

MAX_SEED = 2**63 - 1
MAX_BIASES = 1024
"""Tokens of `SamplingParams.logit_bias`, as in vLLM."""


class Range(NamedTuple):
    """What a number may be; ``value in range`` is false for NaN."""

    low: float
    high: float = inf
    low_open: bool = False
    """Not ``low`` itself."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high and not self._left_out(value)

    def _left_out(self, value: float) -> bool:
        return self.low_open and value == self.low

    def __str__(self) -> str:
        low, high = (f"{end}" if isinstance(end, int) else f"{end:.10g}" for end in (self.low, self.high))
        least = f"above {low}" if self.low_open else f"from {low}"
        if self.high < inf:
            return f"{least} to {high}"
        return least if self.low_open else f"at least {low}"


RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, low_open=True),
    "top_k": Range(0),
    "min_p": Range(0, 1),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 2, low_open=True),
    "logit_bias": Range(-100, 100),
    "seed": Range(0, MAX_SEED),
}
"""Of `SamplingParams`, whatever way a number comes in: wire, command line, a model's own file, the engine."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one stream's tokens are chosen; the same for target, drafter and plain decoding.

    Applied in this order, as vLLM does: logit bias, repetition, frequency and presence penalty, stop tokens held off by
    ``min_tokens``; then temperature, top-k, top-p, min-p. ``temperature`` 0 (anything below 1e-5) is greedy and ignores
    what comes after it. ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 are off.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Stop strings; the text ends before the first one that appears."""
    stop_token_ids: tuple[int, ...] = ()
    """Further stop tokens beside the model's own."""
    ignore_eos: bool = False
    """Do not stop at the model's own stop tokens (``stop_token_ids`` still count)."""
    min_tokens: int = 0
    """No stop token, of the model (even if ``ignore_eos``) or of ``stop_token_ids``, before so many tokens were
    generated, and no stop string that ends in their text."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for every time that it was generated, as OpenAI and vLLM do."""
    presence_penalty: float = 0.0
    """Taken from a token's logit once it was generated."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided by it where positive and multiplied where negative."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit), ids ascending, each once."""


class RecommendedSampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's makers want it sampled: taken for what a request leaves open. None: nothing is recommended."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One stream, as `Engine.submit` takes it. ``prompt_ids`` are tokens, template already applied."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    mode: Mode = "dspark"
    verification: Verification = "rejection"
    max_chunk_gap_ms: float = 0.0
    """Bound on the time between two of its chunks, kept when possible; 0: the engine's own."""
    record_rounds: bool = False
    """Ask for a `RoundRecord` with every `TokensEvent`."""
    client: str = ""
    """Who asks, as far as fair shares go: streams of one client stand in one line. Never a key."""


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one verification round did for one stream; the words are in ARCHITECTURE.md."""

    start: int
    """Position of the anchor token."""
    anchor: int
    draft_tokens: list[int]
    """Proposed tokens: of the drafter at most γ; empty where the stream did not draft."""
    scheduled: int
    """Verification length ℓ."""
    accepted: int
    """Accepted draft tokens, before any stop cut the round short."""
    bonus: int
    """The target's own token that ends the round; -1 where it had none (`errors.NoTokenError`)."""
    confidence: list[float]
    """c_1, c_2, …, calibrated; one for each of ``draft_tokens``."""
    survival: list[float]
    """a_1, a_2, … = running products of ``confidence``."""
    t_draft_ms: float
    t_verify_ms: float
    source: Source = "model"
    """Who proposed ``draft_tokens``: the drafter, or lookup in the stream's own prompt and text."""
    batch_tokens: int
    """B, the target tokens of the whole batch in this round."""
    streams: int
    """R, the streams of the batch in this round."""


class Piece(msgspec.Struct, frozen=True):
    """Text of one or more tokens of the same origin."""

    text: str
    drafted: bool
    """True: proposed by the drafter and accepted. False: the target's own (bonus) token."""


class TokensEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that one round committed for one stream. ``text`` is ``"".join(p.text for p in pieces)``.

    ``text`` can be empty although tokens were committed: half a UTF-8 character, or what may yet become a stop
    string, is held back until the next round.
    """

    request_id: str
    token_ids: list[int]
    text: str
    pieces: list[Piece]
    round: RoundRecord | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a finished stream. Times are in milliseconds; acceptance counts are before stop cuts."""

    input_tokens: int
    output_tokens: int
    rounds: int = 0
    drafted: int = 0
    """Draft tokens proposed."""
    scheduled: int = 0
    """Draft tokens sent to the target."""
    accepted: int = 0
    """Draft tokens accepted."""
    accepted_per_position: list[int] = msgspec.field(default_factory=list)
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def accepted_length(self) -> float:
        """τ = 1 + accepted / rounds; 0 where no round was run."""
        return 1.0 + self.accepted / self.rounds if self.rounds else 0.0


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A `DsparkError` as data."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None


class FinishedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The one terminal event of a stream: nothing with this ``request_id`` follows it."""

    request_id: str
    reason: FinishReason
    usage: Usage
    error: ErrorInfo | None = None
    """Set exactly when ``reason`` is ``"failed"``."""


EngineEvent = TokensEvent | FinishedEvent


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine serves and its limits, for `/v1/models`, `/props` and ``dspark:hello``."""

    model: str
    drafter: str | None
    gamma: int
    """Draft block size; 0 without a drafter."""
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_token_bytes: int
    """The longest token's UTF-8 length: a text of n bytes has at least n / max_token_bytes tokens."""
    dtype: str
    device: str
    target_quant: str
    draft_quant: str
    schedule: str
    sampling: RecommendedSampling = RecommendedSampling()


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters at one moment; counters only grow."""

    running: int
    waiting: int
    held: int
    """Running streams that are out of the batch because their reader is slow."""
    kv_tokens_used: int
    kv_tokens_total: int
    rounds_total: int
    num_drafts_total: int
    num_draft_tokens_total: int
    num_scheduled_tokens_total: int
    num_accepted_tokens_total: int
    num_accepted_tokens_per_pos: list[int]
    prompt_tokens_total: int
    generation_tokens_total: int
    num_skipped_drafts_total: int = 0
    """Rounds of streams that may be drafted for and were not."""
    num_probes_total: int = 0
    """Times that rounds were run another way than the best one, to see whether it pays by now."""
    late_chunks_total: int = 0
    """Chunks that came later than the bound on their stream's gaps."""
    capacity_drift: float = 1.0
    """How many times as long rounds take as when the capacity curve was measured."""
    last_step_age_s: float
    """Seconds since the engine thread last came round its loop; grows only when it is stuck or dead."""
    alive: bool
    failure: str = ""
    """Why the engine does no more work, in words that clients may read; empty while it does."""
