"""``dspark-stream eval``: what a drafter is worth on prompts, in accepted tokens and in speed.

Everything is counted from `RoundRecord`, which tells what a round accepted before a stop token or a limit cut
the text, so that where answers end does not colour the figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from dspark_stream.engine.boundary import Tokenizer
from dspark_stream.errors import ConfigError, InternalError
from dspark_stream.local import LocalEngine
from dspark_stream.progress import Progress
from dspark_stream.types import (
    FinishedEvent,
    GenerationRequest,
    Mode,
    RoundRecord,
    SamplingParams,
    TokensEvent,
    Usage,
    Verification,
)

CALIBRATION_BINS = 10

DEFINITIONS = """\
figures, for each file and in all:
  accepted_length         tokens a round commits, the bonus token included: 1 + accepted / rounds, before a
                          stop token or the limit cuts a round short
  acceptance_by_position  at k = 1, 2, …: of the rounds in which draft token k was scheduled and 1 … k-1 were
                          accepted, the share that accepted k as well (null: there was no such round)
  calibration_error       expected calibration error: how far the promised prefix survival a_k is from the
                          observed share of rounds that accepted 1 … k, over 10 equal bins of a_k, using the
                          scheduled positions, averaged over k (null: nothing was scheduled)
  tokens_per_s_user       mean over streams: tokens after the first / time since the first
  tokens_per_s_total      all tokens / wall time, prompts included
  rounds                  verification rounds
"""


class Message(msgspec.Struct, frozen=True):
    """One turn, as chat APIs write it."""

    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True):
    """One line of a prompt file. Other fields of the line are left alone."""

    messages: list[Message]
    domain: str = ""
    set: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How every prompt is run."""

    sampling: SamplingParams
    mode: Mode
    verification: Verification
    streams: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What `DEFINITIONS` defines, of one file or of all."""

    prompts: int
    output_tokens: int
    rounds: int
    accepted_length: float | None
    acceptance_by_position: list[float | None]
    calibration_error: float | None
    tokens_per_s_user: float | None
    tokens_per_s_total: float | None
    wall_s: float


# --- prompts -----------------------------------------------------------------------------------------------


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read a prompt file: one JSON object a line, with ``messages`` that end in a user's turn.

    Raises:
        ConfigError: the file or a line cannot be read; the message names both.
    """
    prompts: list[Prompt] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(prompts) >= limit:
                    break
                if line.strip():
                    prompts.append(_read_prompt(line, f"{path}:{number}"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="prompts") from None
    if not prompts:
        raise ConfigError(f"{path}: there is no prompt in it", param="prompts")
    return prompts


def _read_prompt(line: bytes, place: str) -> Prompt:
    try:
        prompt = msgspec.json.decode(line, type=Prompt)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: {error}", param="prompts") from None
    if not prompt.messages or prompt.messages[-1].role != "user":
        raise ConfigError(f"{place}: messages must end with a turn of the user", param="prompts")
    return prompt


# --- running -----------------------------------------------------------------------------------------------


class Tally:
    """Gathers rounds and timings; two of them add up, so that "in all" is counted and not averaged."""

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []
        self.user_speeds: list[float] = []
        self.prompts = 0
        self._accepted = 0
        self.output_tokens = 0
        self.wall_s = 0.0

    def __iadd__(self, other: Tally) -> Tally:
        self.rounds += other.rounds
        self.user_speeds += other.user_speeds
        self.prompts += other.prompts
        self._accepted += other._accepted
        self.output_tokens += other.output_tokens
        self.wall_s += other.wall_s
        return self

    def add_round(self, record: RoundRecord) -> None:
        """Count a verification round."""
        self.rounds.append(record)
        self._accepted += record.accepted

    def add_stream(self, usage: Usage) -> None:
        """Count a stream that has finished. Its first token comes out of the prompt's own pass."""
        self.prompts += 1
        self.output_tokens += usage.output_tokens
        if usage.output_tokens > 1 and usage.decode_ms > 0:
            self.user_speeds.append(1000 * (usage.output_tokens - 1) / usage.decode_ms)

    def accepted_length(self) -> float | None:
        """Mean tokens a round, before cuts."""
        if not self.rounds:
            return None
        return 1 + self._accepted / len(self.rounds)

    def figures(self) -> Figures:
        """All figures of what was gathered so far."""
        return Figures(
            prompts=self.prompts,
            output_tokens=self.output_tokens,
            rounds=len(self.rounds),
            accepted_length=self.accepted_length(),
            acceptance_by_position=acceptance_by_position(self.rounds),
            calibration_error=calibration_error(self.rounds),
            tokens_per_s_user=statistics.fmean(self.user_speeds) if self.user_speeds else None,
            tokens_per_s_total=self.output_tokens / self.wall_s if self.wall_s > 0 else None,
            wall_s=self.wall_s,
        )


def run_prompts(
    engine: LocalEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    plan: Plan,
    progress: Progress,
    label: str,
) -> Tally:
    """Run ``prompts``, ``plan.streams`` at once, and count.

    Raises:
        DsparkError: a prompt that the engine refuses, or a stream that failed.
    """
    tally = Tally()

    def requests() -> Iterator[GenerationRequest]:
        for number, prompt in enumerate(prompts):
            ids = tokenizer.encode_chat([(turn.role, turn.content) for turn in prompt.messages])
            yield GenerationRequest(
                request_id=f"{label}#{number + 1}",
                prompt_ids=tuple(ids),
                sampling=plan.sampling,
                mode=plan.mode,
                verification=plan.verification,
                record_rounds=True,
            )

    begun_s = time.perf_counter()
    with progress.bar(label, len(prompts), "prompt") as bar:
        for event, _ in engine.run(requests(), plan.streams):
            if isinstance(event, TokensEvent):
                if event.round is not None:
                    tally.add_round(event.round)
            else:
                _check_finished(event)
                tally.add_stream(event.usage)
                bar.advance(note=f"accepted length {_number(tally.accepted_length())}")
    tally.wall_s = time.perf_counter() - begun_s
    return tally


def _check_finished(event: FinishedEvent) -> None:
    if event.reason not in ("stop", "length"):
        why = event.error.message if event.error else event.reason
        raise InternalError(f"{event.request_id}: {why}")


# --- figures -----------------------------------------------------------------------------------------------


def acceptance_by_position(rounds: Sequence[RoundRecord]) -> list[float | None]:
    """Conditional acceptance: at k, over rounds with k scheduled and 1 … k-1 accepted."""
    shares: list[float | None] = []
    for k in range(1, max((one.scheduled for one in rounds), default=0) + 1):
        tried = sum(one.scheduled >= k and one.accepted >= k - 1 for one in rounds)
        passed = sum(one.accepted >= k for one in rounds)
        shares.append(passed / tried if tried else None)
    return shares


def calibration_error(rounds: Sequence[RoundRecord]) -> float | None:
    """Expected calibration error of prefix survival over scheduled positions, averaged over positions."""
    errors = []
    for k in range(1, max((one.scheduled for one in rounds), default=0) + 1):
        promised = [(one.survival[k - 1], one.accepted >= k) for one in rounds if one.scheduled >= k]
        errors.append(_expected_calibration_error(promised))
    return statistics.fmean(errors) if errors else None


def _expected_calibration_error(promised: Sequence[tuple[float, bool]]) -> float:
    """Σ over bins of |mean promise − share that held|, weighted by how much falls into the bin."""
    sums = [0.0] * CALIBRATION_BINS
    for promise, held in promised:
        sums[min(int(promise * CALIBRATION_BINS), CALIBRATION_BINS - 1)] += promise - held
    # Within a bin, n·|mean promise − mean held| = |Σ (promise − held)|.
    return sum(map(abs, sums)) / len(promised)


# --- showing -----------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("prompts", lambda f: str(f.prompts)),
    ("tokens", lambda f: str(f.output_tokens)),
    ("rounds", lambda f: str(f.rounds)),
    ("accepted length", lambda f: _number(f.accepted_length)),
    ("tok/s a user", lambda f: _number(f.tokens_per_s_user, 1)),
    ("tok/s total", lambda f: _number(f.tokens_per_s_total, 1)),
    ("calibration error", lambda f: _number(f.calibration_error, 3)),
    ("acceptance at 1, 2, …", lambda f: " ".join(_number(a) for a in f.acceptance_by_position) or "-"),
)


def table(figures: dict[str, Figures]) -> str:
    """Lay figures out for people, a row for each name."""
    rows = [("", *(title for title, _ in _COLUMNS))]
    rows += [(name, *(show(one) for _, show in _COLUMNS)) for name, one in figures.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at in (0, last) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def quantisation_cost(quantised: Figures, bare: Figures) -> str:
    """Say what quantisation does to the accepted length."""
    if quantised.accepted_length is None or bare.accepted_length is None:
        return "quantisation: no rounds to compare"
    change = quantised.accepted_length - bare.accepted_length
    return (
        f"quantisation: accepted length {bare.accepted_length:.3f} → {quantised.accepted_length:.3f} "
        f"({change:+.3f}, {100 * change / bare.accepted_length:+.1f}%)"
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def evaluate(
    engine: LocalEngine,
    tokenizer: Tokenizer,
    files: dict[str, list[Prompt]],
    plan: Plan,
    progress: Progress,
) -> tuple[dict[str, Figures], Figures]:
    """Run every file (path → prompts) in turn; returns the figures of each, and of all together."""
    together = Tally()
    figures = {}
    for name, prompts in files.items():
        tally = run_prompts(engine, tokenizer, prompts, plan, progress, Path(name).name)
        figures[name] = tally.figures()
        together += tally
    return figures, together.figures()
