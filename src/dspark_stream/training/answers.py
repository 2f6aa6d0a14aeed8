"""Answer files: what the target wrote to prompts. JSONL, one answer a line.

A line is ``{"domain", "temperature", "prompt_ids", "answer_ids", "writer"}``. ``"held_out": true`` says that it must
never be trained on, also by a later run that goes on from this run's drafter. Further fields are ignored. Lines have
token ids, not text: a drafter must learn the very tokens that the target chose.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dspark_stream.console import SILENT, Progress
from dspark_stream.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """One answer with its prompt, tokens under the chat template. n tokens in all."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    domain: str = ""
    temperature: float = 0.0
    held_out: bool = False
    writer: str = ""
    """Who let the target write it, where that is known."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer, [n]."""
        return self.prompt_ids + self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Split:
    """Answers to train on and answers held out; no prompt is in both."""

    train: list[Answer]
    held_out: list[Answer]


def read_answers(path: Path, vocab_size: int, *, limit: int | None = None, progress: Progress = SILENT) -> list[Answer]:
    """All complete answers of a file. Left out, and said: answers without tokens or prompt, and what a killed writer
    left half-written at the very end.

    Raises:
        ConfigError: no such file, nothing in it, or a broken line that is not the last (the message has its number).
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"answers file {path} cannot be read: {error}", param="answers") from error
    answers: list[Answer] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(answers) >= limit:
            break
        try:
            answers.append(parse_answer(line, vocab_size))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                progress.say(f"{path}, line {number} was cut off and is left out")
                break
            raise ConfigError(f"{path}, line {number}: no usable answer: {error}", param="answers") from error
    usable = [a for a in answers if a.answer_ids and a.prompt_ids]
    if not usable:
        raise ConfigError(f"{path} holds no answer with a prompt", param="answers")
    if len(usable) < len(answers):
        progress.say(f"{path}: {len(answers) - len(usable)} answers without tokens are left out")
    return usable


def parse_answer(line: bytes, vocab_size: int) -> Answer:
    """One line.

    Raises:
        ValueError, TypeError: not JSON, a field missing, or ids that the target does not have.
    """
    raw = json.loads(line)
    if not isinstance(raw, dict):
        raise TypeError("not a JSON object")
    if missing := [name for name in ("prompt_ids", "answer_ids") if name not in raw]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    ids = {name: tuple(int(i) for i in raw[name]) for name in ("prompt_ids", "answer_ids")}
    for name, values in ids.items():
        if values and not 0 <= min(values) <= max(values) < vocab_size:
            raise ValueError(f"{name} has ids outside the target's vocabulary of {vocab_size}")
    return Answer(
        ids["prompt_ids"],
        ids["answer_ids"],
        str(raw.get("domain", "")),
        float(raw.get("temperature", 0.0)),
        raw.get("held_out") is True,
        str(raw.get("writer", "")),
    )


def answer_line(answer: Answer, **further: object) -> str:
    """One line, with its newline."""
    fields = {
        **further,
        "domain": answer.domain,
        "temperature": answer.temperature,
        "prompt_ids": answer.prompt_ids,
        "answer_ids": answer.answer_ids,
        **({"held_out": True} if answer.held_out else {}),
        **({"writer": answer.writer} if answer.writer else {}),
    }
    return json.dumps(fields) + "\n"


def split_answers(answers: list[Answer], held_out: int, seed: int) -> Split:
    """Hold out prompts until ``held_out`` greedy answers are, taking domains in turn; at most a tenth of all. Where
    lines of the file say that they are held out, those and no others are.

    By conversation, not by answer: a prompt answered twice must not be on both sides, nor a turn and a later one of the
    same conversation. Greedy answers are what the walk of `validate.py` needs; where a file has none, sampled ones
    stand in (their figure is then a lower bound).
    """
    of_prompt: dict[tuple[int, ...], list[Answer]] = {}
    roots = first_turns(answers)
    for answer in answers:
        of_prompt.setdefault(roots[answer.prompt_ids], []).append(answer)
    any_greedy = any(a.temperature == 0 for a in answers)
    chosen = {roots[a.prompt_ids] for a in answers if a.held_out}
    queues: dict[str, list[tuple[int, ...]]] = {}
    for prompt, own in of_prompt.items():
        if not any_greedy or any(a.temperature == 0 for a in own):
            queues.setdefault(own[0].domain, []).append(prompt)
    rng = random.Random(seed)
    for domain in sorted(queues):
        rng.shuffle(queues[domain])
    most = min(held_out, max(1, len(of_prompt) // 10)) if len(of_prompt) > 1 and not chosen else 0
    while len(chosen) < most and any(queues.values()):
        for domain in sorted(queues):
            if queues[domain] and len(chosen) < most:
                chosen.add(queues[domain].pop())
    return Split(
        train=[a for a in answers if roots[a.prompt_ids] not in chosen],
        held_out=[a for a in answers if roots[a.prompt_ids] in chosen and (a.temperature == 0 or not any_greedy)],
    )


def first_turns(answers: list[Answer]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Of each prompt the one that its conversation began with: the shortest prompt of all that it begins with."""
    prompts = {a.prompt_ids for a in answers}
    lengths = sorted({len(p) for p in prompts})
    return {
        p: next(start for n in lengths if n <= len(p) and (start := p[:n]) in prompts)  # at the latest itself
        for p in prompts
    }


def draft_vocabulary(answers: list[Answer], size: int, vocab_size: int, always: tuple[int, ...]) -> list[int]:
    """The ``size`` target tokens that a drafter needs most, ascending.

    ``always`` (stop tokens) first, then by use in answers, then by use in prompts, then the lowest ids, which in a
    byte-pair vocabulary are the commonest.
    """
    in_answers = Counter(t for a in answers for t in a.answer_ids)
    in_prompts = Counter(t for a in answers for t in a.prompt_ids)
    ranked = sorted(range(vocab_size), key=lambda t: (t not in always, -in_answers[t], -in_prompts[t], t))
    return sorted(ranked[:size])
