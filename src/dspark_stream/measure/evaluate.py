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

from dspark_stream.console import Progress
from dspark_stream.decoding.calibration import Bin, expected_calibration_error, reliability
from dspark_stream.engine.boundary import Tokenizer
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ConfigError, ContextLengthError, InternalError
from dspark_stream.types import (
    MAX_SEED,
    FinishedEvent,
    GenerationRequest,
    Mode,
    RoundRecord,
    SamplingParams,
    TokensEvent,
    Usage,
    Verification,
)

CONTEXT_BOUNDS = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Rounds are grouped by where they start, for accepted length against context length."""
LOOKUP_NGRAMS = (3, 2)
LOOKUP_DRAFTS = 7

DEFINITIONS = """\
figures, for each file and in all:
  accepted_length         tokens a round commits, the bonus token included: 1 + accepted / rounds, before a
                          stop token or the limit cuts a round short
  acceptance_by_position  at k = 1, 2, …: of the rounds in which draft token k was scheduled and 1 … k-1 were
                          accepted, the share that accepted k as well (null: there was no such round)
  calibration_error       expected calibration error: how far the promised prefix survival a_k is from the
                          observed share of rounds that accepted 1 … k, over 10 equal bins of a_k, using the
                          scheduled positions, averaged over k (null: nothing was scheduled)
  calibration_error_by_position, reliability
                          the same at k = 1, 2, …, and its bins: mean promise, share that held, rounds
  prompt_lookup_length    accepted length that prompt lookup would have had on the same texts: the tokens after the
                          latest earlier place of the last 3 (else 2) tokens, at most 7, are its drafts
  by_turn, by_context     accepted length and rounds by how many turns the user has had and by where rounds start
  passed_over             prompts, and later turns, that were not asked: too long for max_model_len with their answer
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
    follow_ups: list[str] = []
    """The user's next turns, if the conversation goes on."""


GOLDEN = 0.618034
"""Its multiples, less their whole parts, fill 0 … 1 evenly however many there are."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How every prompt is run."""

    sampling: SamplingParams
    mode: Mode
    verification: Verification
    streams: int
    turns: int = 1
    """Most turns of a conversation; those after the first are the prompt's ``follow_ups``."""
    spread: float = 0.0
    """Answers of ``max_tokens`` less or more that share of it, evenly: of equal length, plain streams would all end in
    the same round, and no other ones do.
    """

    def sampling_of(self, number: int) -> SamplingParams:
        """Of one prompt. Each has its own seed, since coupled noise is drawn by (seed, position)."""
        share = 2.0 * (number * GOLDEN % 1.0) - 1.0
        return msgspec.structs.replace(
            self.sampling,
            seed=((self.sampling.seed or 0) + number) % (MAX_SEED + 1),
            max_tokens=max(1, round(self.sampling.max_tokens * (1.0 + self.spread * share))),
        )

    def fits(self, number: int, ids: Sequence[int], engine: LocalEngine) -> bool:
        """Whether a prompt's tokens and its answer's are no more than the engine holds."""
        return len(ids) + self.sampling_of(number).max_tokens <= engine.info.max_model_len


class Part(msgspec.Struct, frozen=True):
    """Some of the rounds."""

    rounds: int
    accepted_length: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What `DEFINITIONS` defines, of one file or of all."""

    prompts: int
    output_tokens: int
    rounds: int
    accepted_length: float | None
    acceptance_by_position: list[float | None]
    calibration_error: float | None
    calibration_error_by_position: list[float]
    reliability: list[list[Bin]]
    prompt_lookup_length: float | None
    passed_over: int
    by_turn: dict[str, Part]
    by_context: dict[str, Part]
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
        self.output_tokens = 0
        self.passed_over = 0
        self.wall_s = 0.0
        self._accepted = 0
        self._lookup: list[int] = []
        self._by_turn: dict[str, list[int]] = {}
        self._by_context: dict[str, list[int]] = {}

    def __iadd__(self, other: Tally) -> Tally:
        self.rounds += other.rounds
        self.user_speeds += other.user_speeds
        self.prompts += other.prompts
        self.output_tokens += other.output_tokens
        self.passed_over += other.passed_over
        self.wall_s += other.wall_s
        self._accepted += other._accepted
        self._lookup += other._lookup
        for own, theirs in ((self._by_turn, other._by_turn), (self._by_context, other._by_context)):
            for name, accepted in theirs.items():
                own.setdefault(name, []).extend(accepted)
        return self

    def add_round(self, record: RoundRecord, turn: int = 1) -> None:
        """Count a verification round."""
        self.rounds.append(record)
        self._accepted += record.accepted
        self._by_turn.setdefault(str(turn), []).append(record.accepted)
        self._by_context.setdefault(context_range(record.start), []).append(record.accepted)

    def add_stream(self, usage: Usage) -> None:
        """Count a stream that has finished. Its first token comes out of the prompt's own pass."""
        self.prompts += 1
        self.output_tokens += usage.output_tokens
        if usage.output_tokens > 1 and usage.decode_ms > 0:
            self.user_speeds.append(1000 * (usage.output_tokens - 1) / usage.decode_ms)

    def add_text(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Count what prompt lookup would have made of a finished text."""
        self._lookup += prompt_lookup([*prompt_ids, *output_ids], len(prompt_ids) + 1)  # the first token is undrafted

    def accepted_length(self) -> float | None:
        """Mean tokens a round, before cuts."""
        if not self.rounds:
            return None
        return 1 + self._accepted / len(self.rounds)

    def figures(self) -> Figures:
        """All figures of what was gathered so far."""
        promises = survival_promises(self.rounds)
        errors = [expected_calibration_error(*pair) for pair in promises]
        return Figures(
            prompts=self.prompts,
            output_tokens=self.output_tokens,
            rounds=len(self.rounds),
            accepted_length=self.accepted_length(),
            acceptance_by_position=acceptance_by_position(self.rounds),
            calibration_error=statistics.fmean(errors) if errors else None,
            calibration_error_by_position=errors,
            reliability=[reliability(*pair) for pair in promises],
            prompt_lookup_length=_mean_length(self._lookup),
            passed_over=self.passed_over,
            by_turn=_parts(self._by_turn, sorted(self._by_turn, key=int)),
            by_context=_parts(self._by_context, [context_range(b - 1) for b in CONTEXT_BOUNDS]),
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
    """Run ``prompts``, ``plan.streams`` at once, turn by turn, and count.

    A prompt that would not fit ``max_model_len`` with its answer is passed over, and a conversation whose next turn
    would not ends before it; both are said and counted.

    Raises:
        DsparkError: no prompt that fits, one that the engine refuses, or a stream that failed.
    """
    tally = Tally()
    chats = [[(turn.role, turn.content) for turn in prompt.messages] for prompt in prompts]
    begun_s = time.perf_counter()
    asked = encode_prompts(engine, tokenizer, prompts, plan, label)
    if left_out := [i + 1 for i in range(len(prompts)) if i not in asked]:
        tally.passed_over += len(left_out)
        progress.say(
            f"{label}: {len(left_out)} prompts are passed over, the first of them prompt {left_out[0]}: with "
            f"max_tokens {plan.sampling.max_tokens} they are longer than max_model_len, {engine.info.max_model_len}"
        )
    for turn in range(1, plan.turns + 1):
        named = label if turn == 1 else f"{label}, turn {turn}"
        users = {i: sum(role == "user" for role, _ in chats[i]) for i in asked}
        answers = _run_turn(engine, asked, users, plan, progress, named, tally)
        asked = {}
        too_long = 0
        for i, answer in sorted(answers.items()):
            if turn == plan.turns or len(prompts[i].follow_ups) < turn:
                continue
            follow_up = prompts[i].follow_ups[turn - 1]
            chats[i] += [("assistant", tokenizer.decode(answer).strip()), ("user", follow_up)]
            ids = tuple(tokenizer.encode_chat(chats[i]))
            if plan.fits(i, ids, engine):
                asked[i] = ids
            else:
                too_long += 1
        if too_long:
            progress.say(f"{label}: {too_long} conversations end after turn {turn}: the next is too long for the model")
            tally.passed_over += too_long
        if not asked:
            break
    tally.wall_s = time.perf_counter() - begun_s
    return tally


def encode_prompts(
    engine: LocalEngine, tokenizer: Tokenizer, prompts: Sequence[Prompt], plan: Plan, label: str
) -> dict[int, tuple[int, ...]]:
    """Tokens of the prompts that fit the engine with their answers, by number.

    Raises:
        ContextLengthError: none does.
    """
    chats = [[(turn.role, turn.content) for turn in prompt.messages] for prompt in prompts]
    encoded = {i: tuple(tokenizer.encode_chat(chat)) for i, chat in enumerate(chats)}
    fit = {i: ids for i, ids in encoded.items() if plan.fits(i, ids, engine)}
    if encoded and not fit:
        raise ContextLengthError(
            f"{label}: no prompt fits with max_tokens {plan.sampling.max_tokens}: max_model_len is "
            f"{engine.info.max_model_len}",
            param="max_tokens",
        )
    return fit


def _run_turn(
    engine: LocalEngine,
    asked: dict[int, tuple[int, ...]],
    users: dict[int, int],
    plan: Plan,
    progress: Progress,
    label: str,
    tally: Tally,
) -> dict[int, list[int]]:
    """One turn of the conversations ``asked`` (number → prompt's tokens), in which the user has spoken ``users`` times:
    each answer's tokens.
    """
    running: dict[str, tuple[int, tuple[int, ...], list[int]]] = {}
    answers: dict[int, list[int]] = {}

    def requests() -> Iterator[GenerationRequest]:
        for number, ids in asked.items():
            request = GenerationRequest(
                request_id=f"{label}#{number + 1}",
                prompt_ids=ids,
                sampling=plan.sampling_of(number),
                mode=plan.mode,
                verification=plan.verification,
                record_rounds=True,
            )
            running[request.request_id] = (number, request.prompt_ids, [])
            yield request

    with progress.bar(label, len(asked), "prompt") as bar:
        for event, _ in engine.run(requests(), plan.streams):
            if isinstance(event, TokensEvent):
                running[event.request_id][2].extend(event.token_ids)
                if event.round is not None:
                    tally.add_round(event.round, users[running[event.request_id][0]])
            else:
                _check_finished(event)
                number, prompt_ids, ids = running.pop(event.request_id)
                answers[number] = ids
                tally.add_stream(event.usage)
                tally.add_text(prompt_ids, ids)
                bar.advance(note=f"accepted length {_number(tally.accepted_length())}")
    return answers


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


def survival_promises(rounds: Sequence[RoundRecord]) -> list[tuple[list[float], list[bool]]]:
    """At k = 1, 2, …: the promised survival of every round that scheduled k, and whether it accepted 1 … k."""
    pairs = []
    for k in range(1, max((one.scheduled for one in rounds), default=0) + 1):
        asked = [one for one in rounds if one.scheduled >= k]
        pairs.append(([one.survival[k - 1] for one in asked], [one.accepted >= k for one in asked]))
    return pairs


def prompt_lookup(ids: Sequence[int], start: int) -> list[int]:
    """Accepted drafts of each round, had ``ids[start:]`` been drafted by looking up n-grams in what came before.

    The free alternative to a drafter. Its drafts are certain, so whatever the temperature each is accepted exactly if
    the text goes on with it: walking along a finished text gives its acceptance without running anything.
    """
    latest: dict[tuple[int, ...], int] = {}
    """Where each n-gram last ended, before the place looked from."""
    accepted: list[int] = []
    at, known = start, 0
    while at + LOOKUP_DRAFTS < len(ids):
        for end in range(known + 1, at):
            for n in LOOKUP_NGRAMS:
                if end >= n:
                    latest[tuple(ids[end - n : end])] = end
        known = max(known, at - 1)
        found = next((latest[g] for n in LOOKUP_NGRAMS if (g := tuple(ids[at - n : at])) in latest and at >= n), None)
        drafts: list[int] = []
        if found is not None:
            for k in range(found, found + LOOKUP_DRAFTS):  # past what is known it goes on from its own drafts
                drafts.append(ids[k] if k < at else drafts[k - at])
        count = next((k for k, draft in enumerate(drafts) if draft != ids[at + k]), len(drafts))
        accepted.append(count)
        at += count + 1
    return accepted


def context_range(position: int) -> str:
    """The range of `CONTEXT_BOUNDS` that a position is in, in words."""
    low = 0
    for bound in CONTEXT_BOUNDS:
        if position < bound:
            return f"{low}-{bound - 1}"
        low = bound
    return f"{low}-"


def _mean_length(accepted: Sequence[int]) -> float | None:
    return 1 + statistics.fmean(accepted) if accepted else None


def _parts(accepted: dict[str, list[int]], names: Sequence[str]) -> dict[str, Part]:
    known = [*names, *(name for name in accepted if name not in names)]
    return {name: Part(len(accepted[name]), 1 + statistics.fmean(accepted[name])) for name in known if name in accepted}


# --- showing -----------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("prompts", lambda f: str(f.prompts)),
    ("tokens", lambda f: str(f.output_tokens)),
    ("rounds", lambda f: str(f.rounds)),
    ("accepted length", lambda f: _number(f.accepted_length)),
    ("tok/s a user", lambda f: _number(f.tokens_per_s_user, 1)),
    ("tok/s total", lambda f: _number(f.tokens_per_s_total, 1)),
    ("calibration error", lambda f: _number(f.calibration_error, 3)),
    ("prompt lookup", lambda f: _number(f.prompt_lookup_length)),
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


def parts_table(figures: Figures) -> str:
    """Accepted length by turn and by context length, a line each; by turn only where there are several."""
    lines = []
    for title, parts in (("turn", figures.by_turn), ("context", figures.by_context)):
        if len(parts) > 1:
            cells = [f"{name}: {part.accepted_length:.2f} ({part.rounds})" for name, part in parts.items()]
            lines.append(f"accepted length (rounds) by {title}:  " + "  ".join(cells))
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


def labels(paths: Sequence[Path]) -> list[str]:
    """What to call files: their names, or where two are the same their whole paths."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def evaluate(
    engine: LocalEngine,
    tokenizer: Tokenizer,
    files: dict[str, list[Prompt]],
    plan: Plan,
    progress: Progress,
) -> tuple[dict[str, Figures], Figures]:
    """Run every file (path → prompts) in turn; returns the figures of each, and of all together.

    Raises:
        DsparkError: a file of which no prompt fits (before any is run), or see `run_prompts`.
    """
    for name, prompts in files.items():
        encode_prompts(engine, tokenizer, prompts, plan, name)
    together = Tally()
    figures = {}
    for name, prompts in files.items():
        tally = run_prompts(engine, tokenizer, prompts, plan, progress, Path(name).name)
        figures[name] = tally.figures()
        together += tally
    return figures, together.figures()
