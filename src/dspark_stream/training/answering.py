"""The target's texts: what a drafter learns from. Prompts (its own, where no files are given), answers, later turns.

Half of the answers are greedy and half are drawn at temperature 1, within each domain, so that the drafter meets
both kinds of text. What is asked, how, and with which seed is a function of the plan and of the texts before it, so a
killed run goes on with exactly what is missing. One file a stage in the run's folder, each in the order of its
prompts::

    given.jsonl    prompts of the files, as they were at the beginning: those may change or go
    prompts.jsonl  user turns that the target wrote itself
    turn-1.jsonl   answers; then turn-2.prompts.jsonl, turn-2.jsonl and so on
    answers.jsonl  all answers
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_stream.console import SILENT, Progress
from dspark_stream.errors import ConfigError, InvalidRequestError
from dspark_stream.files import write_whole
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.models.tokenizer import TextCodec
from dspark_stream.training.answers import Answer, answer_line
from dspark_stream.training.plan import ANSWERS, OWN_PROMPTS, TrainPlan
from dspark_stream.training.writers import Ask, Writer

Turns = tuple[tuple[str, str], ...]
"""(role, content) pairs."""
Asked = tuple[str, Turns]
"""A prompt: its domain, and turns that end with the user's."""
GIVEN = "given.jsonl"

OWN_DOMAIN = "self"
OPENINGS = (
    *[""] * 8,
    *("Write", "Explain", "Describe", "Create", "What", "How", "Why", "Can you", "Compare", "Summarize", "Suppose"),
    *("Given", "Find", "Solve", "Implement", "Imagine", "You are", "Rewrite", "I need", "List", "Which", "Discuss"),
)
"""How a turn that the target writes begins: as it likes, or with one of these, since its likings are narrow."""
OWN_TEMPERATURE, OWN_TOP_P, OWN_TOKENS = 0.8, 0.95, 96
"""A user's turn is drawn below temperature 1: small models lose the thread at it."""


@dataclass(frozen=True)
class Question:
    """One answer to be written."""

    index: int
    """Its line in the finished file."""
    domain: str
    messages: Turns
    temperature: float


class Ledger:
    """One stage's file of results by index. While it grows it is ``NAME.part``; lines in any order, each whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._part = path, path.with_name(path.name + ".part")
        self.lines = take_up(path if path.exists() else self._part)
        self.done = path.exists()

    def keep(self, lines: Iterable[tuple[int, str]]) -> None:
        """Add lines as they come, then put all in order under the final name.

        Raises:
            ConfigError: the disk is full; what is written stays.
        """
        try:
            with self._part.open("a", encoding="utf-8") as file:
                for index, line in lines:
                    file.write(line)
                    file.flush()
                    self.lines[index] = line
            in_order = self.path.with_name(self.path.name + ".sorted")
            in_order.write_text("".join(self.lines[i] for i in sorted(self.lines)), encoding="utf-8")
            in_order.replace(self.path)
            self._part.unlink()
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {error}; the {len(self.lines)} lines that are there are kept: run "
                "the same command again to go on",
                param="run_dir",
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """The lines in order."""
        return [json.loads(self.lines[i]) for i in sorted(self.lines)]


def take_up(path: Path) -> dict[int, str]:
    """Lines of a ledger by index; a line that a kill cut in half is taken off the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not path.exists():
        return {}
    written: dict[int, str] = {}
    whole = 0
    try:
        with path.open("rb+") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                line = raw.decode()
                written[int(json.loads(line)["index"])] = line
                whole += len(raw)
            file.truncate(whole)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be taken up: {error}; remove it to start anew", param="run_dir") from error
    return written


class Scribe:
    """Runs the stages of one plan, in one folder, with one writer."""

    def __init__(
        self,
        plan: TrainPlan,
        folder: Path,
        prompts: Sequence[Asked],
        writer: Writer,
        codec: TextCodec,
        progress: Progress,
    ) -> None:
        self.plan, self.folder, self.prompts = plan, folder, prompts
        self.writer, self.codec, self.progress = writer, codec, progress

    def write_answers(self) -> Path:
        """All stages; ``folder / 'answers.jsonl'``, complete.

        Raises:
            InternalError: the engine failed; what is written stays.
            ConfigError: no room on the disk (what is written stays, and counts).
        """
        self._write(self.folder / GIVEN, "".join(json.dumps(one) + "\n" for one in self.prompts))
        questions = plan_questions(self.plan, self._prompts())
        lines: list[str] = []
        for turn in range(1, self.plan.turns + 1):
            ledger = self._answer(questions, f"turn-{turn}")
            lines += [ledger.lines[i] for i in sorted(ledger.lines)]
            if turn < self.plan.turns:
                questions = self._follow_up(questions, ledger, turn + 1)
        return self._write(self.folder / ANSWERS, "".join(lines))

    def _write(self, path: Path, text: str) -> Path:
        try:
            write_whole(path, text)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error}; run the same command again", param="run_dir"
            ) from error
        return path

    # --- prompts ---------------------------------------------------------------------------------------------

    def _prompts(self) -> list[Asked]:
        """Every prompt: of the files, and the target's own."""
        prompts = list(self.prompts)
        wanted = self.plan.own_prompts or (0 if prompts else OWN_PROMPTS)
        if wanted:
            texts = self._user_turns([()] * wanted, "prompts", "prompts that the target writes")
            prompts += [(OWN_DOMAIN, (("user", text),)) for text in texts.values()]
        return prompts

    def _user_turns(self, histories: Sequence[Turns], name: str, label: str) -> dict[int, str]:
        """A user's next turn for each history, by its number; left out where what came is no use as a turn."""
        ledger = Ledger(self.folder / f"{name}.jsonl" if name == "prompts" else self.folder / f"{name}.prompts.jsonl")
        rng = random.Random(f"{self.plan.seed} {name}")
        openings = [rng.choice(OPENINGS) for _ in histories]
        refused = 0

        def asks() -> Iterator[Ask]:
            nonlocal refused
            for index, (history, opening) in enumerate(zip(histories, openings, strict=True)):
                if index in ledger.lines:
                    continue
                try:
                    ids = self.codec.encode_open_turn(history, opening)
                except InvalidRequestError:
                    refused += 1
                    continue
                if len(ids) + OWN_TOKENS <= self.writer.max_model_len:
                    yield Ask(index, tuple(ids), OWN_TEMPERATURE, OWN_TOP_P, OWN_TOKENS, self._seed(name, index))

        if not ledger.done:
            with self.progress.bar(label, len(histories) - len(ledger.lines), "turn") as bar:

                def lines() -> Iterator[tuple[int, str]]:
                    for ask, ids, ended in self.writer.write(asks()):
                        text = (openings[ask.number] + self.codec.decode(ids)).strip()
                        yield ask.number, json.dumps({"index": ask.number, "text": text, "ended": ended}) + "\n"
                        bar.advance()

                ledger.keep(lines())
        if refused:
            self.progress.say(f"{label}: the target's chat template refuses {refused} of them")
        seen: set[str] = set()
        rows = ledger.read()
        texts = {row["index"]: row["text"] for row in rows if row["ended"] and usable(row["text"], seen)}
        if len(texts) < len(rows):
            self.progress.say(f"{label}: {len(texts)} of {len(rows)} are of use; others do not end or say nothing new")
        return texts

    # --- answers ---------------------------------------------------------------------------------------------

    def _answer(self, questions: Sequence[Question], name: str) -> Ledger:
        ledger = Ledger(self.folder / f"{name}.jsonl")
        if ledger.done:
            return ledger
        by_index = {q.index: q for q in questions}
        skipped = 0

        def asks() -> Iterator[Ask]:
            nonlocal skipped
            for q in questions:
                if q.index in ledger.lines:
                    continue
                try:
                    ids = self.codec.encode_chat(q.messages)
                except InvalidRequestError:
                    ids = []
                if not ids or len(ids) + self.plan.answer_tokens > self.writer.max_model_len:
                    skipped += 1
                    continue
                yield Ask(q.index, tuple(ids), q.temperature, 1.0, self.plan.answer_tokens, self._seed(name, q.index))

        with self.progress.bar(f"answers, {name}", len(questions) - len(ledger.lines), "answer") as bar:

            def lines() -> Iterator[tuple[int, str]]:
                tokens = 0
                for ask, ids, ended in self.writer.write(asks()):
                    question = by_index[ask.number]
                    answer = Answer(ask.prompt_ids, ids, question.domain, ask.temperature, writer=self.writer.name)
                    yield ask.number, answer_line(answer, index=ask.number, ended=ended)
                    tokens += len(ids)
                    bar.advance(note=f"{tokens} tokens")

            ledger.keep(lines())
        if skipped:
            self.progress.say(f"{skipped} prompts were passed over: too long, or refused by the target's chat template")
        return ledger

    def _follow_up(self, questions: Sequence[Question], ledger: Ledger, turn: int) -> list[Question]:
        """Next turns of some conversations: those whose answer came to an end of itself, drawn from the seed."""
        by_index = {q.index: q for q in questions}
        ended = [row for row in ledger.read() if row["ended"]]
        share = self.plan.follow_ups if turn == 2 else 1.0  # who has come to a second turn goes on
        random.Random(f"{self.plan.seed} turn {turn}").shuffle(ended)
        chosen = [by_index[row["index"]] for row in ended[: round(share * len(ended))]]
        answers = {row["index"]: self.codec.decode(row["answer_ids"]).strip() for row in ended}
        histories: list[Turns] = [(*q.messages, ("assistant", answers[q.index])) for q in chosen]
        texts = self._user_turns(histories, f"turn-{turn}", f"user's turns, turn {turn}")
        first = max(by_index, default=-1) + 1
        return [
            Question(first + i, chosen[i].domain, (*histories[i], ("user", text)), 0.0 if at % 2 == 0 else 1.0)
            for at, (i, text) in enumerate(sorted(texts.items()))
        ]

    def _seed(self, name: str, index: int) -> int:
        return random.Random(f"{self.plan.seed} {name} {index}").getrandbits(62)


def usable(text: str, seen: set[str]) -> bool:
    """Whether a turn that the target wrote for a user is of use: not tiny, not a stutter, not a repetition.

    ``seen``: the texts that were, so far; added to.
    """
    words = text.casefold().split()
    if len(words) < 4 or len(set(words)) < 0.6 * len(words) or " ".join(words) in seen:
        return False
    seen.add(" ".join(words))
    return True


def given_prompts(plan: TrainPlan, folder: Path, progress: Progress = SILENT) -> list[Asked]:
    """Prompts of the plan's files, or what they were when the run in ``folder`` began.

    Raises:
        ConfigError: a file or a line of it cannot be read; nothing has been asked yet.
    """
    path = folder / GIVEN
    if not path.exists():
        return read_files(plan.prompts)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        prompts = [(domain, tuple((role, content) for role, content in turns)) for domain, turns in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be taken up: {error}", param="run_dir") from error
    if prompts:
        progress.say(f"going on with the {len(prompts)} prompts that the run began with")
    return prompts


def read_files(files: Sequence[str]) -> list[Asked]:
    """Every line of prompt files.

    Raises:
        ConfigError: a file or a line of it cannot be read.
    """
    prompts = [(p.domain or Path(f).stem, p.messages) for f in files for p in read_prompts(Path(f))]
    return [(domain, tuple((m.role, m.content) for m in messages)) for domain, messages in prompts]


def plan_questions(plan: TrainPlan, prompts: Sequence[Asked]) -> list[Question]:
    """What is to be asked, in order: all prompts shuffled together, from the seed.

    With a limit above the number of prompts they are asked again, those times at temperature 1 only: a second greedy
    answer would be the first once more.
    """
    shuffled = list(prompts)
    random.Random(plan.seed).shuffle(shuffled)
    count = len(shuffled) if plan.limit is None or not shuffled else plan.limit
    asked: Counter[str] = Counter()
    questions: list[Question] = []
    for index in range(count):
        domain, messages = shuffled[index % len(shuffled)]
        greedy = index < len(shuffled) and asked[domain] % 2 == 0
        asked[domain] += 1
        questions.append(Question(index, domain, messages, 0.0 if greedy else 1.0))
    return questions
