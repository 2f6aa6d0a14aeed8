"""What a training run is: every setting that its result depends on, saved beside the weights. A leaf.

No torch here: the command line reads this to print its help.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dspark_stream.config import DEFAULT_MODEL
from dspark_stream.errors import ConfigError
from dspark_stream.files import write_whole
from dspark_stream.types import MAX_SEED

HeadChoice = Literal["markov", "gated", "rnn", "none"]
Start = Literal["target", "random"]
STARTS: tuple[Start, ...] = ("target", "random")
HEADS: tuple[HeadChoice, ...] = ("markov", "gated", "rnn", "none")
FILE = "train.json"
LOCK = "lock"
ANSWERS = "answers.jsonl"
STATE = "state.pt"
OWN_PROMPTS = 2000
CAN_DEEPEN = ("llama", "qwen3")
"""Families whose layers add the output projections as they are. Where a norm comes between, a layer that adds nothing
would add its full share after the smallest step."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Settings of `dspark-stream train`; the options' help says what each is."""

    target: str = DEFAULT_MODEL
    prompts: tuple[str, ...] = ()
    answers: str | None = None
    licences: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    seed: int = 0
    limit: int | None = None
    held_out: int = 48
    # texts
    own_prompts: int = 0
    """0: `OWN_PROMPTS` where no prompt files are given, else none."""
    turns: int = 3
    follow_ups: float = 0.2
    answer_tokens: int = 256
    streams: int = 64
    writer: Literal["auto", "engine", "openvino"] = "auto"
    # drafter
    init: str | None = None
    """Folder of a drafter to go on from; the shape is its."""
    add_layers: int = 0
    """Layers put on top of those of ``init``; they pass on what they are given until they are trained."""
    start: Start = "target"
    layers: int = 2
    block_size: int = 7
    head: HeadChoice = "markov"
    rank: int = 128
    draft_vocab: int = 8192
    taps: tuple[int, ...] = ()
    mask_token_id: int | None = None
    # training
    steps: int | None = None
    minutes: float | None = None
    batch: int = 12
    anchors: int = 24
    lr: float = 2e-3
    optimizer: Literal["muon", "adamw"] = "muon"
    validate_every: int = 500
    checkpoint_minutes: float = 3.0
    feature_budget: int = 16 * 2**30

    def __post_init__(self) -> None:
        for name, low, high in (
            ("layers", 1, 32),
            ("add_layers", 0, 32),
            ("block_size", 1, 64),
            ("rank", 1, 4096),
            ("batch", 1, 4096),
            ("anchors", 1, 4096),
            ("own_prompts", 0, 2**24),
            ("turns", 1, 64),
            ("follow_ups", 0, 1),
            ("answer_tokens", 2, 2**20),
            ("streams", 1, 4096),
            ("held_out", 1, 10_000),
            ("validate_every", 1, 2**40),
            ("seed", 0, MAX_SEED),
            ("draft_vocab", 0, 2**24),
            ("feature_budget", 0, 2**60),
            ("threads", 0, 4096),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} {getattr(self, name)} is not in {low} … {high}", param=name)
        for name, known in (("head", HEADS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} {getattr(self, name)!r}; known: {', '.join(known)}", param=name)
        if self.add_layers and self.init is None:
            raise ConfigError("--add-layers puts layers on those of a drafter and needs --init", param="add_layers")
        if self.answers and (self.prompts or self.own_prompts):
            raise ConfigError("--answers stands instead of --prompts and --own-prompts", param="answers")
        if not self.steps and not self.minutes:
            raise ConfigError(
                "how long to train is not said: give --minutes or --steps, as in: "
                "dspark-stream train --target MODEL --minutes 60",
                param="minutes",
            )
        for name in ("lr", "checkpoint_minutes", *(("minutes",) if self.minutes is not None else ())):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} {getattr(self, name)} is not above 0", param=name)
        for name in ("steps", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} is not above 0", param=name)


TEXTS = frozenset(
    {"target", "prompts", "answers", "seed", "limit", "own_prompts", "turns", "follow_ups", "answer_tokens"}
)
"""Settings that texts depend on. Until a state is saved all others may be given anew: only texts are there."""
GIVEN_TEXTS = frozenset({"target", "prompts", "own_prompts", "answers"})
"""The same where texts are given."""
HOW = frozenset({"validate_every", "checkpoint_minutes", "feature_budget", "threads", "streams", "writer"})
MAY_CHANGE = HOW | {"steps", "minutes", "licences"}
"""Settings that a resumed run may be given anew: how far to go, how fast, and who writes what is still to be written.
Other threads share the sums of a gradient differently, so they change the last bits of weights."""


def shaped(plan: TrainPlan) -> TrainPlan:
    """The plan with the shape of the drafter that it starts from, if it does, the layers added to it among them.

    Raises:
        ConfigError: that drafter's configuration cannot be read, or layers of its family cannot be added.
    """
    if plan.init is None:
        return plan
    path = Path(plan.init) / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        if plan.add_layers and raw["model_type"] not in CAN_DEEPEN:
            raise ConfigError(
                f"layers cannot be added to a drafter of type {raw['model_type']!r}, only {', '.join(CAN_DEEPEN)}",
                param="add_layers",
            )
        rank, kind = raw.get("markov_rank") or 0, raw.get("markov_head_type")
        return replace(
            plan,
            layers=raw["num_hidden_layers"] + plan.add_layers,
            block_size=raw["block_size"],
            head="none" if not rank else kind if kind in ("gated", "rnn") else "markov",
            rank=rank or plan.rank,
            draft_vocab=raw.get("draft_vocab_size") or 0,
            taps=tuple(raw["target_layer_ids"]),
            mask_token_id=raw["mask_token_id"],
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"no drafter to start from at {path}: {error!r}", param="init") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two runs in one would write into each other's files. It is made if missing, and goes again
    if the run leaves nothing in it but its plan.

    Raises:
        ConfigError: another run is at work in it, or it cannot be written.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error}", param="run_dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the process ends, however it does
        except BlockingIOError:
            raise ConfigError(
                f"another run is at work in {folder}: wait for it, or give another --run-dir", param="run_dir"
            ) from None
        except OSError:  # a file system without locks: then nobody is kept out
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                if made and {one.name for one in folder.iterdir()} <= {FILE, LOCK}:
                    for name in (FILE, LOCK):
                        (folder / name).unlink(missing_ok=True)
                    folder.rmdir()


def unlike(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of two plans (as JSON has them) that are not the same, by name: then and now.

    What a plan lacks is newer than it and had its default in it; ``./a`` and ``a/`` are ``a``.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return os.path.normpath(value) if isinstance(value, str) else value

    defaults = json.loads(json.dumps({f.name: f.default for f in fields(TrainPlan)}))
    earlier, now = defaults | earlier, defaults | now
    return {n: (earlier[n], now[n]) for n in defaults if plain(earlier[n]) != plain(now[n])}


def anew(folder: Path) -> str:
    """Where what concerns training alone can be given anew, in words."""
    if (folder / STATE).exists():
        return f"in a run of its own: --run-dir NEW --answers {folder / ANSWERS}, without prompts"
    return "in the same folder, where nothing is trained yet"


def settle(plan: TrainPlan, folder: Path) -> None:
    """Save the plan in a run's folder; in a folder where a run has written anything, check that this is the same one.

    Raises:
        ConfigError: the folder is another run's (the message names what differs), or cannot be written.
    """
    path = folder / FILE
    raw: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    try:
        if path.exists() and any(one.name not in (FILE, FILE + ".part", LOCK) for one in folder.iterdir()):
            differing = unlike(json.loads(path.read_text()), raw)
            texts = GIVEN_TEXTS if plan.answers else TEXTS
            refused = differing.keys() - MAY_CHANGE if (folder / STATE).exists() else differing.keys() & texts
            if refused:
                told = "; ".join(f"{name}: {old} → {new}" for name, (old, new) in differing.items() if name in refused)
                hint = "" if refused & texts else f", where its texts are of use: --answers {folder / ANSWERS}"
                raise ConfigError(
                    f"{folder} holds a run with other settings ({told}): give the same or another --run-dir{hint}",
                    param="run_dir",
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(raw, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {error}", param="run_dir") from error
