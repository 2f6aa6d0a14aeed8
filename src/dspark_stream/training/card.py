"""The card beside a trained drafter: what it was made from, how, and how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from dspark_kernels.cpu import cpu_name
from dspark_stream import __version__
from dspark_stream.measure.calibrate import Fit
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.training.answers import Answer, Split
from dspark_stream.training.log import last_figures
from dspark_stream.training.loop import Trainer
from dspark_stream.training.plan import FILE, TrainPlan
from dspark_stream.types import Acceptance

CARD = "card.md"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is told of a training when its models are gone."""

    target: str
    split: Split
    config: DrafterConfig
    vocab: tuple[int, int]
    """Draft tokens, target tokens."""
    parameters: int
    steps: int
    rows: int
    elapsed_s: float
    machine: str
    feature_bytes: int
    """On disk."""

    @classmethod
    def by(cls, trainer: Trainer, split: Split, target: str) -> Trained:
        """Of a trainer at its end."""
        drafter = trainer.drafter
        return cls(
            target=target,
            split=split,
            config=drafter.config,
            vocab=(drafter.draft_vocab_size, drafter.vocab_size),
            parameters=sum(p.numel() for p in trainer.parameters),
            steps=trainer.step,
            rows=trainer.rows,
            elapsed_s=trainer.elapsed_s,
            machine=hardware(trainer.device),
            feature_bytes=trainer.features.nbytes,
        )


def write_card(plan: TrainPlan, trained: Trained, run_folder: Path, fits: dict[Acceptance, Fit]) -> str:
    """The card as Markdown. Held-out figures are the log's last, and those of the calibration's rounds."""
    config, split = trained.config, trained.split
    head = "none (DFlash)" if not config.markov_rank else f"{config.markov_head_type}, rank {config.markov_rank}"
    figures = last_figures(run_folder)
    if plan.init is None:
        began = "the target's last ones where shapes allow" if plan.start == "target" else "noise"
    else:
        began = f"the drafter {Path(plan.init).name}"
    if plan.add_layers:
        began += f", {plan.add_layers} of them put on top of its own"
    lines = [
        f"# DSpark drafter for {trained.target}",
        "",
        f"Made by `dspark-stream train` {__version__}; every setting is in `{FILE}` beside this card.",
        "",
        "| | |",
        "| --- | --- |",
        f"| layers | {config.num_layers}, started from {began} |",
        f"| block size γ | {config.block_size} |",
        f"| sequential head | {head} |",
        f"| draft vocabulary | {trained.vocab[0]} of {trained.vocab[1]} tokens |",
        f"| taps | {', '.join(map(str, config.target_layer_ids))} |",
        f"| mask token | {config.mask_token_id} |",
        f"| own parameters | {trained.parameters / 1e6:.1f} million |",
        "",
        "## Data",
        "",
        "Only answers that the target itself wrote; prompts were read, never predicted.",
        "",
        *_data(split),
        "",
        *(f"- {line}" for line in (*_sources(plan), *_writers(split))),
        "",
        "## Training",
        "",
        f"- {trained.steps} steps, {trained.rows // config.block_size} blocks of γ rows, seed {plan.seed}",
        f"- {trained.elapsed_s / 60:.1f} minutes of training on {trained.machine}",
        "",
        "## Held-out figures",
        "",
        *_figures(figures, config.block_size),
        "",
        "## In the engine",
        "",
        *_fits(fits),
        "",
    ]
    return "\n".join(lines)


def _data(split: Split) -> Iterable[str]:
    yield "| domain | answers | answer tokens | held out |"
    yield "| --- | --- | --- | --- |"
    held_out = Counter(a.domain for a in split.held_out)
    for domain in sorted({a.domain for a in (*split.train, *split.held_out)}):
        own = [a for a in split.train if a.domain == domain]
        yield f"| {domain or '-'} | {len(own)}{_greedy(own)} | {_tokens(own)} | {held_out[domain]} |"
    yield f"| all | {len(split.train)}{_greedy(split.train)} | {_tokens(split.train)} | {len(split.held_out)} |"


def _greedy(answers: list[Answer]) -> str:
    return f" ({sum(a.temperature == 0 for a in answers)} greedy)"


def _tokens(answers: list[Answer]) -> int:
    return sum(len(a.answer_ids) for a in answers)


def _sources(plan: TrainPlan) -> Iterable[str]:
    if plan.licences:
        yield from plan.licences
        return
    if plan.answers:
        yield f"Answers file: {Path(plan.answers).name}"
    else:
        if plan.own_prompts or not plan.prompts:
            yield "Prompts that the target wrote itself" + ("." if plan.prompts else "; none were given.")
        if not plan.prompts:
            return
        yield "Prompt files: " + ", ".join(Path(p).name for p in plan.prompts)
    yield "Licences were not given (`--licence`)."


def _writers(split: Split) -> Iterable[str]:
    by = Counter(a.writer for a in (*split.train, *split.held_out) if a.writer)
    if by:
        yield "Answers written by: " + ", ".join(f"{name} ({count})" for name, count in by.most_common())


def _figures(figures: dict[str, str], gamma: int) -> Iterable[str]:
    if not figures:
        yield "None were taken."
        return
    yield "Greedy walk over held-out greedy answers; accepted length is tokens committed a round, γ drafts verified."
    yield ""
    yield "| | accepted length |"
    yield "| --- | --- |"
    yield f"| all | {figures['accepted_length']} |"
    for name, value in figures.items():
        if name.startswith("accepted_length_") and value:
            yield f"| {name.removeprefix('accepted_length_') or '-'} | {value} |"
    yield ""
    yield f"Acceptance of draft 1 … {gamma}, given that those before it were accepted: {figures['by_position']}."


def _fits(fits: dict[Acceptance, Fit]) -> Iterable[str]:
    if not fits:
        yield "Not calibrated: the held-out prompts gave too few rounds. `dspark-stream calibrate` takes others."
        return
    yield "The held-out prompts, run by the engine with all drafts verified: greedily, and at temperature 1 under both"
    yield "verifications. Expected calibration error of prefix survival, mean over positions: before calibration, after"
    yield "it on the same rounds, and what chance alone would show if every promise were right."
    yield ""
    yield "| | rounds | accepted length | error before | error after | by chance |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for way, fit in fits.items():
        shown = " | ".join(f"{100 * fmean(errors):.1f} %" for errors in (fit.before, fit.after, fit.floor))
        yield f"| {way} | {fit.rounds} | {fit.accepted_length:.2f} | {shown} |"


def hardware(device: torch.device) -> str:
    """What the training ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_name()}, {torch.get_num_threads()} threads)"
