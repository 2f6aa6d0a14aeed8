"""The target answers prompts, through the engine in plain mode: what a drafter learns from.

Half of the answers are greedy and half are drawn at temperature 1, within each domain, so that the drafter meets
both kinds of text. What is asked, how, and with which seed is a function of the plan, so a killed run goes on with
exactly what is missing; the finished file is in the order of the prompts.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_stream.engine.boundary import Tokenizer
from dspark_stream.errors import ConfigError, InternalError, InvalidRequestError
from dspark_stream.evaluate import read_prompts
from dspark_stream.local import LocalEngine
from dspark_stream.progress import Progress
from dspark_stream.training.answers import Answer, answer_line
from dspark_stream.training.plan import TrainPlan
from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams, TokensEvent


@dataclass(frozen=True)
class Question:
    """One answer to be written."""

    index: int
    """Its line in the finished file."""
    domain: str
    messages: tuple[tuple[str, str], ...]
    """(role, content)"""
    temperature: float


def plan_questions(plan: TrainPlan) -> list[Question]:
    """What is to be asked, in order: all files' prompts shuffled together, from the seed.

    With a limit above the number of prompts they are asked again, those times at temperature 1 only: a second greedy
    answer would be the first once more.

    Raises:
        ConfigError: a prompt file or a line of it cannot be read; nothing has been asked yet.
    """
    prompts = [(p.domain or Path(f).stem, p.messages) for f in plan.prompts for p in read_prompts(Path(f))]
    random.Random(plan.seed).shuffle(prompts)
    count = len(prompts) if plan.limit is None else plan.limit
    asked: Counter[str] = Counter()
    questions: list[Question] = []
    for index in range(count):
        domain, messages = prompts[index % len(prompts)]
        greedy = index < len(prompts) and asked[domain] % 2 == 0
        asked[domain] += 1
        turns = tuple((m.role, m.content) for m in messages)
        questions.append(Question(index, domain, turns, 0.0 if greedy else 1.0))
    return questions


def write_answers(
    plan: TrainPlan, folder: Path, engine: LocalEngine, tokenizer: Tokenizer, max_model_len: int, progress: Progress
) -> Path:
    """Ask what is not answered yet; ``folder / 'answers.jsonl'``, complete.

    Raises:
        InternalError: the engine failed; what is written stays.
        ConfigError: prompts that cannot be read, or no room on the disk (what is written stays, and counts).
    """
    done = folder / "answers.jsonl"
    questions = plan_questions(plan)
    part = folder / "answers.part.jsonl"
    written = take_up(part)
    left = [q for q in questions if q.index not in written]
    skipped = 0
    try:
        with part.open("a", encoding="utf-8") as file, progress.bar("answers", len(left), "answer") as bar:
            tokens = 0
            for question, answer in _ask(plan, left, engine, tokenizer, max_model_len):
                if answer is None:
                    skipped += 1
                    bar.advance()
                    continue
                line = answer_line(answer, index=question.index)
                file.write(line)
                file.flush()
                written[question.index] = line
                tokens += len(answer.answer_ids)
                bar.advance(note=f"{tokens} tokens")
        sorted_part = folder / "answers.sorted.jsonl"
        sorted_part.write_text("".join(written[i] for i in sorted(written)), encoding="utf-8")
        sorted_part.replace(done)
        part.unlink()
    except OSError as error:
        raise ConfigError(
            f"answers cannot be written to {folder}: {error}; the {len(written)} that are there are kept: run the "
            "same command again to go on",
            param="run_dir",
        ) from error
    if skipped:
        progress.say(f"{skipped} prompts were passed over: too long for this target, or refused by its chat template")
    return done


def take_up(part: Path) -> dict[int, str]:
    """Lines of an unfinished file by index; a line that a kill cut in half is taken off the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not part.exists():
        return {}
    written: dict[int, str] = {}
    whole = 0
    try:
        with part.open("rb+") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                line = raw.decode()
                written[int(json.loads(line)["index"])] = line
                whole += len(raw)
            file.truncate(whole)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{part} cannot be taken up: {error}; remove it to start anew", param="run_dir") from error
    return written


def _ask(
    plan: TrainPlan, questions: Sequence[Question], engine: LocalEngine, tokenizer: Tokenizer, max_model_len: int
) -> Iterator[tuple[Question, Answer | None]]:
    """Questions with their answers, as they come; None where the target cannot be asked."""
    refused: list[Question] = []
    running: dict[str, tuple[Question, list[int], list[int]]] = {}

    def requests() -> Iterator[GenerationRequest]:
        for question in questions:
            try:
                prompt_ids = tokenizer.encode_chat(question.messages)
            except InvalidRequestError:
                refused.append(question)
                continue
            if len(prompt_ids) + plan.answer_tokens > max_model_len:
                refused.append(question)
                continue
            name = str(question.index)
            running[name] = (question, prompt_ids, [])
            yield GenerationRequest(
                request_id=name,
                prompt_ids=tuple(prompt_ids),
                sampling=SamplingParams(
                    max_tokens=plan.answer_tokens,
                    temperature=question.temperature,
                    seed=plan.seed * 1_000_003 + question.index,
                ),
                mode="plain",
            )

    for event, _ in engine.run(requests(), plan.streams):
        while refused:
            yield refused.pop(), None
        if isinstance(event, TokensEvent):
            running[event.request_id][2].extend(event.token_ids)
        elif isinstance(event, FinishedEvent):
            question, prompt_ids, answer_ids = running.pop(event.request_id)
            if event.reason not in ("stop", "length"):
                why = event.error.message if event.error else event.reason
                raise InternalError(f"the engine failed at answer {question.index}: {why}")
            yield question, Answer(tuple(prompt_ids), tuple(answer_ids), question.domain, question.temperature)
    for question in refused:
        yield question, None
